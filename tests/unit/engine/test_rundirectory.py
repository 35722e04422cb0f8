"""Who may write where the two processes meet: made anew it is shared, and what somebody else decided stays as it is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nvcache.engine.rundirectory import make_run_directory

GROUP = 65532 if os.geteuid() == 0 else os.getegid()


def facts(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    return tmp_path / "run" / "nvcache"


@pytest.fixture(autouse=True)
def careless_umask() -> object:
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_both_are_made_whatever_the_umask(upper: Path) -> None:
    make_run_directory(upper / "disks", GROUP)
    assert facts(upper) == (os.geteuid(), GROUP, 0o3775)
    assert facts(upper / "disks") == (os.geteuid(), os.getegid(), 0o755), "neither the group nor the set-group-ID bit of the one above"
    make_run_directory(upper / "disks", GROUP)
    assert facts(upper) == (os.geteuid(), GROUP, 0o3775)


def test_without_a_group_nothing_is_shared(upper: Path) -> None:
    make_run_directory(upper / "disks", None)
    assert facts(upper)[2] == facts(upper / "disks")[2] == 0o755


@pytest.mark.parametrize("there", [(), ("disks",), ("pods", "serve.json", "disks")])
def test_one_as_the_kubelet_makes_it_is_shared(upper: Path, there: tuple[str, ...]) -> None:
    upper.mkdir(parents=True)
    upper.chmod(0o755)
    for name in there:
        (upper / name).mkdir()
    make_run_directory(upper / "disks", GROUP)
    assert facts(upper) == (os.geteuid(), GROUP, 0o3775)


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o711, 0o2755, 0o3770, 0o775, 0o1777])
def test_a_mode_that_somebody_chose_stays(upper: Path, mode: int) -> None:
    upper.mkdir(parents=True)
    upper.chmod(mode)
    before = facts(upper)
    make_run_directory(upper / "disks", GROUP)
    assert facts(upper) == before
    assert facts(upper / "disks")[2] == 0o755


def test_a_directory_with_other_things_in_it_is_not_given_away(upper: Path) -> None:
    """`run_directory = "/var/lib/disks"` must not let the daemon write in /var/lib."""
    upper.mkdir(parents=True)
    upper.chmod(0o755)
    (upper / "dpkg").mkdir()
    make_run_directory(upper / "disks", GROUP)
    assert facts(upper) == (os.geteuid(), os.getegid(), 0o755)


def test_a_link_is_used_and_what_it_names_stays_as_it_is(upper: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir(mode=0o755)
    there.chmod(0o755)
    upper.parent.mkdir()
    upper.symlink_to(there)
    make_run_directory(upper / "disks", GROUP)
    assert facts(there) == (os.geteuid(), os.getegid(), 0o755)
    assert facts(there / "disks")[2] == 0o755


def test_what_another_user_owns_stays_theirs(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (upper / "disks").mkdir(parents=True)
    upper.chmod(0o755)
    before = facts(upper), facts(upper / "disks")
    monkeypatch.setattr(os, "geteuid", lambda: upper.stat().st_uid + 1)
    make_run_directory(upper / "disks", GROUP)
    assert (facts(upper), facts(upper / "disks")) == before
