"""What real machines said, for tests to replay: sysfs trees, LVM reports, the first bytes of disks. `recorded.json` holds it; nothing is made up.

Taken on a Debian 12 guest (kernel 6.1, mdadm 4.2, LVM 2.03.16, util-linux 2.38) with emulated NVMe disks.
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

from nvcache.system.sysfs import Kernel

_ALL = json.loads(Path(__file__).with_suffix(".json").read_text())
MACHINES: dict[str, dict[str, object]] = _ALL["machines"]
REPORTS: dict[str, dict[str, str]] = _ALL["reports"]
HEADS = {name: zlib.decompress(base64.b64decode(found["head"])) for name, found in _ALL["heads"].items()}  # 64 KiB each
BLKID: dict[str, str] = {name: found["blkid"] for name, found in _ALL["heads"].items()}


def machine(name: str, folder: Path) -> Kernel:
    """The recorded machine `name`, built below `folder`."""
    recorded = MACHINES[name]
    return build(folder, recorded["tree"], str(recorded["mountinfo"]), str(recorded["swaps"]))


def build(folder: Path, tree: object, mountinfo: str = "", swaps: str = "") -> Kernel:
    """A sysfs, a proc and a dev of the devices in `tree`: for each its attributes by their path."""
    assert isinstance(tree, dict)
    block, numbers = folder / "sys/class/block", folder / "sys/dev/block"
    for place in (block, numbers, folder / "proc/1", folder / "dev", folder / "run/udev"):
        place.mkdir(parents=True)
    for name, attributes in tree.items():
        for path, text in attributes.items():
            file = block / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (numbers / attributes["dev"].strip()).symlink_to(block / name)
    (folder / "proc/1/mountinfo").write_text(mountinfo)
    (folder / "proc/swaps").write_text(swaps)
    return Kernel(sys=folder / "sys", proc=folder / "proc", dev=folder / "dev", run=folder / "run")


def image(path: Path, head: bytes, size: int = 8 << 20) -> Path:
    """A file that begins as a recorded disk did, with noise where data would be."""
    with path.open("wb") as file:
        file.truncate(size)
        file.write(head)
        file.seek(2 << 20)
        file.write(b"data" * 1024)
    return path
