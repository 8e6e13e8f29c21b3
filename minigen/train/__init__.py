"""One thin training script a chapter: a dataclass of settings with named presets, `main(config)` and `sample(options)`."""
