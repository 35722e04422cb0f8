"""Tells a Kubernetes cluster what its node has. Needs the extra `kubernetes`; nothing of nvcache depends on it or waits for it."""
