"""The links in the directory where KAITO looks for weights, each to a view in the store's `kaito/`. It makes no view and never looks behind a link.

That directory is somebody else's. Only a symbolic link that leads into our `kaito/` is ours: anything else stays, whatever its name. Making one is
one system call that takes nobody's place, and so is removing it: there is no half-made link, and nothing to sweep after a crash. Nothing is synced:
after a power cut a link may be there again whose view is not, or not be there; the daemon puts both right at its start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


class KaitoLinks:
    """The links of one daemon. All calls block for as long as the directory's own disk takes; the stripe is never touched."""

    def __init__(self, directory: Path, store: Path) -> None:
        """`store` is the store as whoever follows the links sees it."""
        self._directory = directory
        self._views = store / "kaito"

    def make(self, names: Iterable[str]) -> dict[str, str]:
        """Have a link of each name. The answer says of each that cannot be made why, and names what stands in its place."""
        lacking: dict[str, str] = {}
        wanted = list(names)
        try:
            with self._open() as folder:
                for name in wanted:
                    try:
                        self._make(folder, name)
                    except FileExistsError:
                        lacking[name] = f"something that nvcache did not make is at {self._directory / name}, and is left alone"
                    except OSError as error:
                        lacking[name] = f"cannot make the link {self._directory / name}: {error.strerror}"
        except OSError as error:
            return dict.fromkeys(wanted, f"cannot make links in {self._directory}: {error.strerror}")
        return lacking

    def remove(self, names: Iterable[str]) -> None:
        """Have no link of ours of these names. What cannot be removed is said in the log: it leads nowhere once its view is gone."""
        try:
            with self._open() as folder:
                for name in names:
                    self._remove(folder, name)
        except FileNotFoundError:
            return
        except OSError as error:
            log.error("cannot remove links from %s: %s", self._directory, error.strerror)  # noqa: TRY400 - an expected failure

    def keep(self, names: Collection[str]) -> None:
        """Have no link of ours but those of these names: what an earlier life left, or everything."""
        try:
            with self._open() as folder:
                found = os.listdir(folder)  # noqa: PTH208 - of a descriptor
        except FileNotFoundError:
            return
        except OSError as error:
            log.error("cannot look for links in %s: %s", self._directory, error.strerror)  # noqa: TRY400 - an expected failure
            return
        self.remove(sorted(set(found) - set(names)))

    @contextmanager
    def _open(self) -> Iterator[int]:
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield folder
        finally:
            os.close(folder)

    def _make(self, folder: int, name: str) -> None:
        there = self._ours(folder, name)
        target = self._views / name
        if there not in (None, target):
            os.unlink(name, dir_fd=folder)
        if there != target:
            os.symlink(target, name, dir_fd=folder)

    def _remove(self, folder: int, name: str) -> None:
        try:
            if self._ours(folder, name) is not None:
                os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            pass  # somebody was faster
        except OSError as error:
            log.error("cannot remove the link %s: %s", self._directory / name, error.strerror)  # noqa: TRY400 - an expected failure

    def _ours(self, folder: int, name: str) -> Path | None:
        """Where a link of ours leads: into our views. None for anything else, and where nothing is."""
        try:
            target = Path(os.readlink(name, dir_fd=folder))
        except OSError:  # ENOENT: nothing is there. EINVAL: it is no link.
            return None
        return target if target.parent == self._views else None
