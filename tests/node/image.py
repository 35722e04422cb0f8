"""Builds the guest's image, once for each recipe: kernel, initrd and a root disk with the storage tools and nvcache's dependencies. Boots nothing.

The image lies in $NVCACHE_VM_CACHE (default ~/.cache/nvcache-vm) under the digest of everything it is made from; other processes that want the
same one wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

RECIPE = Path(__file__).parent / "recipe"
CHECKOUT = Path(__file__).parents[2]
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "setpriv": "util-linux",
}
GUEST_PYTHON = "3.11"
BUILD_SECONDS = 900


class CannotBuild(Exception):  # noqa: N818 - reads as what it says
    """There is no image, and why: a program is missing or a step failed."""


def cache() -> Path:
    """Where images are kept."""
    return Path(os.environ.get("NVCACHE_VM_CACHE") or Path.home() / ".cache" / "nvcache-vm")


def image() -> Path:
    """The directory with `vmlinux`, `initrd` and `root.img` of this recipe, built if need be (about two minutes). Raises CannotBuild."""
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        raise CannotBuild(
            f"the tests with real disks need a virtual machine: apt-get install --no-install-recommends {' '.join(missing)} (or make apt)"
        )
    requirements = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    place = cache() / _digest(requirements)
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            _build(place, requirements)
    return place


def _digest(requirements: Sequence[str]) -> str:
    parts = [path.read_bytes() for path in sorted(RECIPE.iterdir())] + [requirement.encode() for requirement in sorted(requirements)]
    return hashlib.sha256(b"\0".join([*parts, GUEST_PYTHON.encode()])).hexdigest()[:16]


def _build(place: Path, requirements: Sequence[str]) -> None:
    log = place.with_suffix(".log")
    # fmt: off
    wheels = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", "site", "--only-binary", ":all:",
        "--python-version", GUEST_PYTHON, "--implementation", "cp",
        "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64", *requirements,
    ]
    # fmt: on
    with tempfile.TemporaryDirectory(prefix="build-", dir=place.parent) as name:
        folder = Path(name)
        for step in (wheels, [str(RECIPE / "build.sh")]):
            with log.open("ab") as out:
                code = subprocess.run(
                    step,
                    cwd=folder,
                    env=os.environ | {"RECIPE": str(RECIPE)},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    check=False,
                    timeout=BUILD_SECONDS,
                ).returncode
            if code:
                raise CannotBuild(f"cannot build the guest's image (was apt-get update run?); {log} ends:\n{log.read_text(errors='replace')[-2000:]}")
        (folder / "out" / "vmlinux").write_bytes(_unpacked((folder / "bzimage").read_bytes()))
        (folder / "out").rename(place)


def _unpacked(bzimage: bytes) -> bytes:
    """The ELF kernel in a bzImage (Linux boot protocol, payload_offset and payload_length); unpacking it in the guest would take seconds."""
    setup = (bzimage[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    return lzma.LZMADecompressor().decompress(bzimage[setup + offset : setup + offset + length])
