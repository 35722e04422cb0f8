"""Azure Blob as a source: listing, credentials and pinning. The bytes come by the ranged reader."""
