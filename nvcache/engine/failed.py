"""The disks that failed while in use, noted by serial number where a reboot forgets them: the run directory. It judges no disk."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FailedDisks:
    """The note of one node."""

    run_directory: Path

    @property
    def _path(self) -> Path:
        return self.run_directory / "failed.json"

    def serials(self) -> frozenset[str]:
        """What is noted; a note that cannot be read is none."""
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return frozenset()
        return frozenset(str(serial) for serial in found) if isinstance(found, list) else frozenset()

    def add(self, serials: frozenset[str]) -> None:
        """Note more of them; that it cannot be done is logged."""
        if serials - self.serials():
            temporary = self._path.with_suffix(".new")
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(sorted(self.serials() | serials)) + "\n")
                temporary.rename(self._path)
            except OSError as error:  # the stripe must be withdrawn all the same
                log.error("cannot note the failed disks %s in %s: %s", ", ".join(sorted(serials)), self._path, error.strerror)  # noqa: TRY400

    def forget(self) -> None:
        """Note none any more."""
        self._path.unlink(missing_ok=True)
