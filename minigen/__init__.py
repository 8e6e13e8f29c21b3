"""Draw images by predicting their parts in order: the package of the minigen book."""

__version__ = "0.1.0"


def load(name, kind=None):
    """A trained model by name, such as "imagegpt"; see `minigen.checkpoints.load`."""
    from .checkpoints import load

    return load(name, kind)
