"""Draw pictures by predicting their parts in order: the package of the minigen book."""

__version__ = "0.1.0"
