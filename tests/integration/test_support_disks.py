"""The tests' own mounts. It needs root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.disks import mounted


def test_what_is_still_in_use_is_an_error_and_stays_mounted_nowhere(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="busy"), mounted("tmpfs", tmp_path) as point:
        held = (point / "file").open("w")
    held.close()
    assert not os.path.ismount(tmp_path / "tmpfs")
