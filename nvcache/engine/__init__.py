"""The only place that knows sources and store both: single flight, fetching, verifying, repair. It speaks no HTTP to pods."""
