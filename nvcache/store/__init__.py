"""Content-addressed files on one file system: blobs, ingests, views and the catalog. It fetches nothing and decides nothing about what to keep."""
