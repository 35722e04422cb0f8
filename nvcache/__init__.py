"""nvcache: a node-local cache of model weights that proves every byte it serves."""

__version__ = "0.1.0"
