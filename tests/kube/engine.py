#!/opt/nvcache/bin/python
"""In the place of vLLM: `vllm serve MODEL …`. It maps the weights, says as JSON what it found, and ends; it serves nothing.

MODEL is a directory, or a name that is looked up, or downloaded, as vLLM does it: by huggingface_hub and its variables.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
from pathlib import Path

from huggingface_hub import snapshot_download


def main(model: str) -> None:
    """Load `model`."""
    place = Path(model if Path(model).is_dir() else snapshot_download(model))
    digests = {}
    for path in sorted(place.glob("*.safetensors")):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as weights:
            digests[path.name] = hashlib.sha256(weights).hexdigest()
    print(json.dumps({"place": str(place), "uid": os.getuid(), "read_only": bool(os.statvfs(place).f_flag & os.ST_RDONLY), "sha256": digests}))


if __name__ == "__main__":
    main(sys.argv[2])
