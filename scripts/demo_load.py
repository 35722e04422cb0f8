"""Loads a model the way an inference engine does, by mmap, from one view of the store; it knows no daemon and no source. The demo runs it apart.

`python scripts/demo_load.py flat DIR`, or `hub ORG/NAME` with HF_HUB_CACHE and HF_HUB_OFFLINE=1 set. Prints one JSON object: tensors, bytes,
a SHA-256 over names and data of all tensors, and how many of the files stood mapped in memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import sys
from pathlib import Path

from safetensors import safe_open


def load(folder: Path) -> dict[str, object]:
    """Open every safetensors file below `folder` with the safetensors library and read every tensor's bytes through a mapping."""
    digest, tensors, total, mapped = hashlib.sha256(), 0, 0, 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as opened, path.open("rb") as file:
            mapped += str(path.resolve()) in Path("/proc/self/maps").read_text()
            whole = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            start = 8 + int.from_bytes(whole[:8], "little")
            header = json.loads(bytes(whole[8:start]))
            for name in sorted(opened.keys()):
                first, last = header[name]["data_offsets"]
                if header[name]["shape"] != opened.get_slice(name).get_shape():
                    raise SystemExit(f"cannot load {path.name}: {name} has another shape")
                digest.update(name.encode() + b"\0")
                digest.update(whole[start + first : start + last])
                tensors, total = tensors + 1, total + last - first
    return {"folder": str(folder), "tensors": tensors, "bytes": total, "sha256": digest.hexdigest(), "mapped": mapped}


def main() -> None:
    """The command."""
    kind, where = sys.argv[1:]
    if kind == "hub":
        from huggingface_hub import snapshot_download

        where = snapshot_download(where, local_files_only=True)
    print(json.dumps(load(Path(where))))


if __name__ == "__main__":
    main()
