"""Inference engines that load from nvcache's views, each in a virtual environment of its own: run by hand, outside the test suite."""
