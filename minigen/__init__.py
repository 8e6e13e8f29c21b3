"""A book and a package that draw images by predicting their parts in order

Modules:

- `minigen.bench.sweep`: Which sampling settings draw the best images: the sweep of chapter 5."""

__version__ = "0.1.0"


def load(name, kind=None):
    """A trained model by name, such as "imagegpt"; see `minigen.checkpoints.load`."""
    from .checkpoints import load

    return load(name, kind)
