"""Runs `bench.loaders` in forks of itself, inside the guest, on cold files: importing torch takes half a minute there. It compares nothing.

`python -m bench.forked ASKED ANSWERED` (two pipes) imports what the rows need and says in one line which rows cannot be had and why, a JSON object.
Then it answers each line "ROW DIR" with one: `bench.loaders.Load` as JSON, or {"error": …}.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from bench.cold import drop
from bench.loaders import ROWS, load


def serve(asked: Path, answered: Path) -> None:
    """Answer until the guest ends."""
    with asked.open("r+b", buffering=0) as questions, answered.open("r+b", buffering=0) as answers:
        answers.write(json.dumps(missing()).encode() + b"\n")
        while question := questions.readline().decode().split():
            child = os.fork()
            if not child:
                answers.write(cold(question[0], Path(question[1])).encode() + b"\n")
                os._exit(0)  # without the libraries' own ends, which are not what is asked about
            if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                answers.write(json.dumps({"error": f"it ended with {status}"}).encode() + b"\n")


def missing() -> dict[str, str]:
    """The rows whose packages cannot be imported here, and why; those of the others are imported afterwards."""
    found = {}
    for name, row in ROWS.items():
        try:
            row.prepare()
        except (ImportError, OSError) as error:  # OSError: a library that a package is linked with
            found[name] = f"it cannot be imported: {error}"
    return found


def cold(row: str, directory: Path) -> str:
    """One load of files that are not in the page cache, which is checked page by page: `Load` as JSON."""
    drop(directory)
    return json.dumps(asdict(load(row, directory)[0]))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
