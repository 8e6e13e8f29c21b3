"""Training scripts, one per chapter: `Config`, `PRESETS`, `build` and `sample`."""
