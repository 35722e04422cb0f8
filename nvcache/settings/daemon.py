"""All settings, with what each means and which go together: those of the daemon on top of the disks'. It reads no file and no environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from nvcache.core.directory import of_the_system
from nvcache.core.manifest import CHUNK
from nvcache.core.ref import Ref, parse_alias, parse_ref
from nvcache.errors import RequestError
from nvcache.settings.disks import DiskSettings
from nvcache.settings.sizes import parse_size
from nvcache.sources.mirrors import Mirror

LISTS = ("allow", "az_hosts", "disk_models", "disk_exclude")  # separated by commas in the environment
LIVE = ("models", "allow")  # taken over while the daemon runs; any other counts from the start
TABLES = ("models", "mirrors", "tuning")  # only in the file
SIZES = ("max_bytes", "min_free", "scrub_bandwidth", "hf_bandwidth", "az_bandwidth", "min_disk", "read_ahead")  # written as 140GB or 2TiB
# A qualified name, as keys of labels and taints are: an optional DNS name and "/", then up to 63 characters.
_QUALIFIED = re.compile(r"(?:[a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


@contextmanager
def _said_plainly() -> Iterator[None]:
    """What a reference or a name is refused for, as what is wrong with the setting."""
    try:
        yield
    except RequestError as error:
        raise ValueError(str(error)) from error


class ModelSetting(BaseModel):
    """One `[[models]]` table: a model this node keeps ready."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: str = Field(description="the model, as `nvcache warm` takes it")
    revision: str | None = Field(None, description="branch, tag or commit; the source's default otherwise")
    pin: bool = Field(False, description="never remove it, not by `nvcache rm` either")
    include: tuple[str, ...] = Field((), description="patterns of files to take instead of the default set")
    exclude: tuple[str, ...] = Field((), description="patterns of files to leave out")
    alias: str | None = Field(None, description="name in the HuggingFace view, for models that do not come from the Hub")

    @field_validator("ref", mode="after")
    @classmethod
    def _ref(cls, value: str) -> str:
        with _said_plainly():
            parse_ref(value)
        return value

    @field_validator("alias", mode="after")
    @classmethod
    def _alias(cls, value: str | None) -> str | None:
        with _said_plainly():
            return value if value is None else parse_alias(value)

    @model_validator(mode="after")
    def _one_revision(self) -> ModelSetting:
        with _said_plainly():
            _ = self.reference
        return self

    @property
    def reference(self) -> Ref:
        """The model, with its revision. Raises `RequestError` (bad-reference)."""
        return parse_ref(self.ref if self.revision is None else f"{self.ref}@{self.revision}")


class MirrorSetting(BaseModel):
    """One `[[mirrors]]` table: where files of a known SHA-256 are asked for before their source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(
        description="http(s) URL with `{sha256}`; or for models of the Hub with `{model}` (org/name) and `{path}`, and `{revision}` (the commit) "
        "where it is wanted"
    )
    name: str | None = Field(None, description="what log and metrics call it; default: host and port")
    token_file: Path | None = Field(
        None, description="file with the bearer token to send there, or with a SAS to put behind the URL; read at each file"
    )

    @field_validator("url", mode="after")
    @classmethod
    def _template(cls, value: str) -> str:
        Mirror("", value)  # raises ValueError
        return value

    @field_validator("name", mode="after")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", value):
            raise ValueError("it is not 1 to 64 letters, digits and . _ : -")
        return value

    @field_validator("token_file", mode="after")
    @classmethod
    def _token(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("it is not an absolute path")
        return value

    @property
    def mirror(self) -> Mirror:
        """The mirror, by its name."""
        return Mirror(self.name or urlsplit(self.url).netloc, self.url, self.token_file)


class Settings(DiskSettings):
    """Everything that can be set. Sizes are bytes, times seconds."""

    store: Path = Field(description="the store's root directory")
    socket: Path = Field(description="the Unix socket pods and people use (0660)")
    admin_socket: Path | None = Field(
        None, description="a second socket (0600) that may do everything; without it the daemon's own user may, on `socket`"
    )
    listen: str | None = Field(None, description="host:port to listen on over TCP as well; needs listen_token_file, except for listen_scope metrics")
    listen_token_file: Path | None = Field(None, description="file with the bearer token for `listen`, read at each request")
    listen_scope: Literal["metrics", "read", "pod", "admin"] = Field(
        "read", description="what a bearer of the token may do; metrics: nobody needs a token, and there are health, version and metrics only"
    )
    allow: tuple[str, ...] = Field(("hf://*",), description="references (shell patterns) that callers of the pods' socket may make ready")
    max_bytes: int | None = Field(
        None, gt=0, description="most bytes the store may hold; default: half of what is free, its own files counted as free"
    )
    min_free: int = Field(0, ge=0, description="bytes to leave free on the store's file system")
    evict_high: float = Field(
        0.95,
        gt=0,
        le=1,
        description="part of what the store can hold (max_bytes, or less where the disk has less) above which models are evicted, those used longest "
        "ago first",
    )
    evict_low: float = Field(0.90, gt=0, le=1, description="part of it down to which they are evicted then")
    scrub_days: int = Field(
        7, ge=0, le=3650, description="days within which every ready model is read back once and compared; 0: only when asked for"
    )
    scrub_bandwidth: int = Field(100_000_000, gt=0, description="bytes a second read for that at most, around the page cache")
    workers: int = Field(0, ge=0, le=64, description="processes that fetch, hash and write; 0: one a core, at most 16")
    lanes: int = Field(4, ge=1, le=32, description="range requests in flight for each worker (each holds one chunk of 16 MiB)")
    stall_timeout: float = Field(20.0, gt=0, description="seconds without a byte after which a request is given up and tried anew")
    connect_timeout: float = Field(10.0, gt=0, description="seconds to wait for a connection")
    fetch_deadline: float = Field(600.0, gt=0, description="seconds a file may go without progress before its fill fails")
    resolve_ttl: float = Field(60.0, ge=0, description="seconds a moving revision such as main stays resolved")
    lease_ttl: float = Field(600.0, gt=0, le=86400, description="default life of a lease in seconds")
    direct_io: bool = Field(True, description="write around the page cache where the file system can")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least that is logged")
    log_format: Literal["auto", "json", "console"] = Field("auto", description="JSON lines, or console on a terminal")
    hf_endpoint: str = Field("https://huggingface.co", description="the Hub or a mirror of it (HF_ENDPOINT)")
    hf_token_path: Path | None = Field(None, description="file with the Hub token (HF_TOKEN_PATH), read when needed")
    hf_connections: int | None = Field(None, ge=0, description="range requests in flight to the Hub at most, on this node; default or 0: no limit")
    hf_bandwidth: int | None = Field(
        None, ge=0, description="bytes a second from the Hub at most, on this node; hf_xet (files over 50 GB) keeps to none; default or 0: no limit"
    )
    az_connections: int | None = Field(None, ge=0, description="range requests in flight to Azure Blob at most, on this node; default or 0: no limit")
    az_bandwidth: int | None = Field(None, ge=0, description="bytes a second from Azure Blob at most, on this node; default or 0: no limit")
    az_account: str | None = Field(None, description="storage account that the key or the SAS is for (AZURE_STORAGE_ACCOUNT)")
    az_connection_string_file: Path | None = Field(None, description="file with a connection string; else AZURE_STORAGE_CONNECTION_STRING, if set")
    az_key_file: Path | None = Field(None, description="file with the account's key; else AZURE_STORAGE_KEY, if set")
    az_sas_file: Path | None = Field(None, description="file with a SAS, read when needed: it may rotate; else AZURE_STORAGE_SAS_TOKEN, if set")
    az_credential: Literal["auto", "identity", "anonymous"] = Field(
        "auto", description="auto: connection string, key or SAS if set for the account, else the node's identity, else anonymous"
    )
    az_suffix: str = Field("core.windows.net", description="domain of az://account: account.blob.<suffix>; sovereign clouds have others")
    az_hosts: tuple[str, ...] = Field(
        (),
        description="hosts (host[:port], or http://host[:port] for one without TLS) outside Azure's own clouds that may be given the SAS or the "
        "identity's token, such as an emulator; the token only over https",
    )
    require_digest: bool = Field(False, description="refuse files of which the source publishes no digest; a request may ask for it as well")
    ca_file: Path | None = Field(None, description="certificates to trust instead of the system's (SSL_CERT_FILE)")
    follow: bool = Field(
        False, description="let another process (`nvcache disks watch`) keep the stripe, and follow what it says in run_directory; needs no root"
    )
    allow_os_disk: bool = Field(False, description="with backend directory: accept a directory on the node's root file system; needs max_bytes")
    allow_any_filesystem: bool = Field(False, description="with backend directory: accept file systems other than xfs, ext4 and btrfs")
    kubernetes: bool = Field(False, description="tell the cluster what this node has ready: labels, annotations, a condition and events on its Node")
    node_name: str | None = Field(None, description="with kubernetes: the name of this node's Node object (spec.nodeName by the downward API)")
    startup_taint: str = Field(
        "nvcache.io/not-ready", description="with kubernetes: key of the taint that is removed from the node once the declared models are ready"
    )
    kaito_models: Path | None = Field(
        None, description="directory where KAITO looks for local weights; a link for each ready model is kept there; unset: none"
    )
    kaito_store: Path | None = Field(None, description="the store as the host sees it, where those links lead; default: the store")
    share_blobs: bool = Field(
        False, description="give bearers of the token the bytes of ready models by SHA-256 over TCP, for other nodes' `[[mirrors]]`"
    )
    mirrors: tuple[MirrorSetting, ...] = Field(
        (), description="where files are asked for before their source, one `[[mirrors]]` table each, in order; only in the file"
    )
    models: tuple[ModelSetting, ...] = Field((), description="models this node keeps ready, one `[[models]]` table each; only in the file")

    @field_validator("max_bytes", "min_free", "scrub_bandwidth", "hf_bandwidth", "az_bandwidth", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        return parse_size(value) if isinstance(value, str) else value

    @field_validator(
        "store",
        "socket",
        "admin_socket",
        "listen_token_file",
        "hf_token_path",
        "az_connection_string_file",
        "az_key_file",
        "az_sas_file",
        "ca_file",
        "kaito_models",
        "kaito_store",
        mode="after",
    )
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        try:
            return None if value is None else Path(os.path.abspath(value.expanduser()))  # noqa: PTH100 - Path.resolve would follow links
        except RuntimeError as error:  # ~somebody without a home
            raise ValueError(str(error)) from error

    @field_validator("kaito_models", mode="after")
    @classmethod
    def _kaito_models(cls, value: Path | None) -> Path | None:
        if value is not None and of_the_system(str(value)):
            raise ValueError("it is, holds or lies in a directory of the system")
        return value

    @field_validator("startup_taint", mode="after")
    @classmethod
    def _taint(cls, value: str) -> str:
        if not _QUALIFIED.fullmatch(value) or len(value.partition("/")[0]) > 253:
            raise ValueError("it is not the key of a taint, such as nvcache.io/not-ready (without value and effect)")
        return value

    @field_validator("hf_endpoint", mode="after")
    @classmethod
    def _endpoint(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise ValueError("it is not an http(s) URL")
        if "@" in value:  # also behind the host: a password may have a slash
            raise ValueError("a URL with a password would be shown; name the token's file in hf_token_path")
        return value.rstrip("/")

    @field_validator("mirrors", mode="after")
    @classmethod
    def _told_apart(cls, value: tuple[MirrorSetting, ...]) -> tuple[MirrorSetting, ...]:
        names = [each.mirror.name for each in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two are called {twice}; give them names")
        return value

    @model_validator(mode="after")
    def _together(self) -> Settings:
        """What no field can judge alone; the error names the setting to change, and those that it is judged by."""
        if self.listen and not self.listen_token_file and self.listen_scope != "metrics":
            by = {"setting": "listen", "with": ("listen_token_file", "listen_scope")}
            raise PydanticCustomError("together", "to listen on TCP needs listen_token_file", by)
        if self.evict_low > self.evict_high:
            raise PydanticCustomError("together", "it is more than evict_high", {"setting": "evict_low", "with": ("evict_high",)})
        if self.share_blobs and (not self.listen or self.listen_scope == "metrics"):
            by = {"setting": "share_blobs", "with": ("listen", "listen_scope")}
            raise PydanticCustomError("together", "to share needs listen, with a token and listen_scope read", by)
        if self.kubernetes and not self.node_name:
            raise PydanticCustomError("together", "to tell the cluster needs node_name", {"setting": "kubernetes", "with": ("node_name",)})
        if self.kaito_models and any(self.kaito_models.is_relative_to(ours) for ours in (self.store, self.mount)):
            by = {"setting": "kaito_models", "with": ("store", "mount")}
            raise PydanticCustomError("together", "it lies in the store, whose views it is to lead to", by)
        if self.follow and self.backend == "directory":
            raise PydanticCustomError("together", "with backend directory there is no stripe to follow", {"setting": "follow", "with": ("backend",)})
        return self

    @property
    def worker_count(self) -> int:
        """How many worker processes to run."""
        return self.workers or min(16, os.cpu_count() or 1)

    @property
    def buffer_bytes(self) -> int:
        """The most memory all workers together hold in chunk buffers."""
        return self.worker_count * self.lanes * CHUNK
