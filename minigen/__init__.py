"""Draw images by predicting their parts in order: the package of the minigen book."""

__version__ = "0.1.0"


def load(name, kind=None):
    """Load a trained model by name, such as "imagegpt": `minigen.checkpoints.load`."""
    from .checkpoints import load

    return load(name, kind)
