"""Adds Debian's packages and the Python to a CycloneDX document of Python packages (stdin to stdout). It scans no files.

Usage: `sbom.py DPKG_STATUS`, the file that dpkg keeps of what is installed (deb822; `Status: install ok installed`). Package URLs are as the purl
specification has them for type deb.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote


def components(status: str, distribution: str) -> Iterator[dict[str, str]]:
    """One CycloneDX component for each installed package in dpkg's `status`, in its order."""
    for paragraph in status.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Status", "").endswith(" installed"):
            name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
            purl = f"pkg:deb/{distribution}/{quote(name)}@{quote(version)}?arch={architecture}"
            yield {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def main() -> None:
    """Read, add, write."""
    document = json.load(sys.stdin)
    distribution = platform.freedesktop_os_release()["ID"]
    python = {"type": "platform", "bom-ref": "python", "name": platform.python_implementation(), "version": platform.python_version()}
    document["components"] += [python, *components(Path(sys.argv[1]).read_text(), distribution)]
    json.dump(document, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
