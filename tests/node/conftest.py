"""Machines for the tests with real disks. Where no virtual machine can run these tests fail and say what to install; they never skip."""

from __future__ import annotations

import compileall
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node.image import CHECKOUT, CannotBuild, image
from tests.node.machine import Disk, Machine, disks

MachineMaker = Callable[..., Machine]


@pytest.fixture(scope="session")
def guest_image() -> Path:
    """The guest's image, built if need be; the checkout is compiled for the guest, which cannot write to it."""
    for part in ("nvcache", "tests"):
        compileall.compile_dir(CHECKOUT / part, quiet=2)
    try:
        return image()
    except CannotBuild as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def machine(guest_image: Path) -> Iterator[MachineMaker]:
    """Makes machines: of a number of equal disks or of those given, and with the options of `Machine`. Their images go with the test."""
    folder = Path(tempfile.mkdtemp(prefix="nvcache-node-"))
    made: list[Machine] = []

    def make(wanted: int | Iterable[Disk] = 4, **options: Any) -> Machine:
        made.append(Machine(folder / str(len(made)), disks(wanted) if isinstance(wanted, int) else wanted, **options))
        return made[-1]

    yield make
    shutil.rmtree(folder)
