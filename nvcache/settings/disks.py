"""The settings of the disks part: which disks to take and what to make of them. It reads no file and no environment."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from nvcache.core.directory import of_the_system
from nvcache.core.tuning import AT_LEAST, Tuning
from nvcache.environment import SYSTEM_DIRECTORY
from nvcache.settings.sizes import parse_size

MOST_READ_AHEAD = 1 << 30  # bytes; the kernel takes more, and one stray read of a page would then read all of it


class QueueSettings(BaseModel):
    """One `[tuning.…]` table: what is set on the block queues of a stripe of that kind, each time that it is mounted or found mounted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    read_ahead: int | None = Field(
        default=None,
        ge=0,
        le=MOST_READ_AHEAD,
        description=f"read-ahead of the mounted device, exactly; default: raised to {AT_LEAST >> 20}MiB where it is lower",
    )
    scheduler: str = Field(default="none", description="I/O scheduler of the stripe's disks")
    rq_affinity: Literal[0, 1, 2] | None = Field(
        default=None, description="CPU that completes a disk's request: 1 one near the CPU that made it, 2 that very CPU; default: left as it is"
    )

    @field_validator("read_ahead", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        return parse_size(value) if isinstance(value, str) else value

    @field_validator("scheduler", mode="after")
    @classmethod
    def _scheduler(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9_-]+", value):
            raise ValueError("it is not the name of a scheduler, such as none or mq-deadline")
        return value


class TuningSettings(BaseModel):
    """The `[tuning]` table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    md: QueueSettings = Field(default=QueueSettings(), description="an md array")
    lvm: QueueSettings = Field(default=QueueSettings(), description="an LVM volume")
    disk: QueueSettings = Field(default=QueueSettings(), description="one disk, without array or volume")


class DiskSettings(BaseModel):
    """What the disks part needs: which disks to take and what to make of them. `nvcache disks` knows these settings alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["directory", "md", "lvm"] | None = Field(
        None,
        description="md or lvm: stripe the node's local NVMe disks and keep the store there; directory: the store's directory lies on a disk that "
        "somebody else mounted, which is checked; unset: any directory",
    )
    mount: Path = Field(Path("/var/lib/nvcache/mnt"), description="where the stripe is mounted; the store is `store` below it")
    filesystem: Literal["xfs", "ext4"] = Field("xfs", description="what a new stripe is formatted with")
    disk_models: tuple[str, ...] = Field(
        (), description="disk models to use besides the built-in Azure, AWS and GCP ones; local and disposable ones only"
    )
    disk_exclude: tuple[str, ...] = Field((), description="serial numbers of disks never to use")
    min_disk: int = Field(100 * 2**30, ge=0, description="disks smaller than this are not used")
    expected_disks: int | None = Field(None, ge=1, description="how many disks the node should have; waits for them before anything is made")
    settle_seconds: float = Field(60.0, ge=0, description="seconds to wait for expected disks that have not come up")
    allow_unequal: bool = Field(False, description="stripe disks whose sizes differ by more than 1 %")
    require_all: bool = Field(True, description="do nothing when any disk of an allowed model is refused; otherwise the rest is used")
    on_lost: Literal["rebuild", "refuse"] = Field("rebuild", description="what to do when members of the stripe are gone, and so its contents")
    store_owner: str | None = Field(None, description="uid:gid that is given the store; default: the user of this process")
    read_ahead: int | None = Field(
        None, ge=0, le=MOST_READ_AHEAD, description="read-ahead of the stripe, whatever its kind; counts before `[tuning]`"
    )
    tuning: TuningSettings = Field(TuningSettings(), description="`[tuning.md]`, `[tuning.lvm]`, `[tuning.disk]`: queue settings by kind of stripe")
    run_directory: Path = Field(SYSTEM_DIRECTORY / "disks", description="where the disks part tells the daemon what it did (stripe.json)")

    @field_validator("*", mode="before")
    @classmethod
    def _switches(cls, value: object, info: ValidationInfo) -> object:
        """`max_bytes = true` would be one byte."""
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"{str(value).lower()} is no value of it")
        return value

    @field_validator("min_disk", "read_ahead", mode="before")
    @classmethod
    def _disk_size(cls, value: object) -> object:
        return parse_size(value) if isinstance(value, str) else value

    @field_validator("mount", "run_directory", mode="after")
    @classmethod
    def _disk_path(cls, value: Path) -> Path:
        plain = Path(os.path.abspath(value))  # noqa: PTH100 - Path.resolve would follow links
        if not value.is_absolute() or not plain.name:
            raise ValueError("it is not an absolute path below /")
        if of_the_system(str(plain)):
            raise ValueError("it is, holds or lies in a directory of the system")
        return plain

    @field_validator("disk_models", "disk_exclude", mode="after")
    @classmethod
    def _trimmed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(text.strip() for text in value)  # as models and serial numbers are compared

    @field_validator("store_owner", mode="after")
    @classmethod
    def _owner(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9]+:[0-9]+", value):
            raise ValueError("it is not of the form uid:gid, in numbers")
        return value

    def tuning_of(self, kind: Literal["md", "lvm", "disk"]) -> Tuning:
        """What is wanted of the queues of a stripe of this kind."""
        table: QueueSettings = getattr(self.tuning, kind)
        return Tuning(table.read_ahead if self.read_ahead is None else self.read_ahead, table.scheduler, table.rq_affinity)
