"""Training scripts, one per chapter: a config, presets, `build`, and `sample`."""
