"""Measurements of nvcache against its peers and against its own promises. Nothing here is a test: a figure never fails a build."""
