"""Fetches what is below a prefix as Azure's SDK is used by most: a blob after the other, each by eight threads of its own. It checks no digest.

``python -m bench.sdk CONTAINER-URL PREFIX DIRECTORY``, anonymously; https trusts SSL_CERT_FILE.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from azure.storage.blob import ContainerClient


def fetch(url: str, prefix: str, directory: Path) -> None:
    """Fetch every blob below `prefix` of the container at `url` into `directory`."""
    with ContainerClient.from_container_url(url, connection_verify=os.environ.get("SSL_CERT_FILE") or True) as container:
        for name in [blob.name for blob in container.list_blobs(name_starts_with=prefix)]:
            path = directory / name.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                container.download_blob(name, max_concurrency=8).readinto(file)


if __name__ == "__main__":
    fetch(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
