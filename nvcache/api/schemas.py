"""The shapes of requests and answers, for validation on the way in and for the OpenAPI document on the way out. Answers are not built from these:
`wire` serialises the engine's snapshots, and the tests hold the two together.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from nvcache.core.manifest import Check, Selection
from nvcache.core.names import UNPRINTABLE
from nvcache.core.plan import Priority
from nvcache.core.ref import Ref, Scheme, parse_ref
from nvcache.core.states import JobState, ModelState
from nvcache.core.timeline import Kind
from nvcache.engine.handover import StripeStatus
from nvcache.engine.status import EnsureRequest
from nvcache.errors import Code, RequestError

Pattern = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
EXAMPLE_REF = "hf://Qwen/Qwen3-0.6B"
EXAMPLE_REVISION = "c1899de289a04d12100db370d81485cdf75e47ca"
EXAMPLE_ENTRY = f"hf--Qwen--Qwen3-0.6B@{EXAMPLE_REVISION}"


class _Asked(BaseModel):
    """A request body: unknown fields and values of another type are refused, never guessed at."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Wish(_Asked):
    """Make a model ready."""

    ref: Annotated[
        str,
        Field(max_length=4096, description="[hf://]org/name[@revision], az://account/container/prefix or file:///dir", examples=[EXAMPLE_REF]),
    ]
    revision: Annotated[str | None, Field(max_length=200, description="branch, tag or commit; instead of the part after @")] = None
    include: Annotated[list[Pattern], Field(max_length=1000, description="shell patterns of files to take; none: the default set")] = []
    exclude: Annotated[list[Pattern], Field(max_length=1000, description="shell patterns of files to leave out")] = []
    alias: Annotated[str | None, Field(max_length=200, description="org/name to show it under in the HuggingFace view")] = None
    pin: Annotated[bool, Field(description="never remove it to make room")] = False
    require_digest: Annotated[bool, Field(description="refuse it when the source publishes no digest for a file")] = False
    priority: Annotated[Literal["demand", "declared"], Field(description="demand: somebody waits for it")] = "demand"
    dry_run: Annotated[bool, Field(description="say what would be done, do nothing")] = False

    def to_request(self) -> EnsureRequest:
        """The engine's form of it. Raises `RequestError`: bad-reference, or bad-request when two revisions are named."""
        return EnsureRequest(
            ref=self._ref(),
            selection=Selection(tuple(self.include), tuple(self.exclude)),
            alias=_hub_name(self.alias),
            pin=self.pin,
            priority=Priority[self.priority.upper()],
            require_digest=self.require_digest,
        )

    def _ref(self) -> Ref:
        ref = parse_ref(self.ref)
        if self.revision is None:
            return ref
        if ref.revision not in (None, self.revision):
            raise RequestError(Code.BAD_REQUEST, f"cannot make {ref} ready: the field revision says {self.revision!r}")
        named = parse_ref(f"{ref.base}@{self.revision}")
        if named.location != ref.location:  # a directory's '@' begins a revision only before a listing digest
            raise RequestError(Code.BAD_REFERENCE, f"cannot read revision {self.revision!r} of {ref}: a directory's revision has 64 hex digits")
        return named


class LeaseWish(_Asked):
    """Hold a model while it is loaded."""

    holder: Annotated[str, Field(max_length=400, pattern=f"^[^{UNPRINTABLE}]*$", description="who holds it, for people", examples=["vllm-0"])] = ""
    ttl_s: Annotated[float | None, Field(gt=0, le=86400, allow_inf_nan=False, description="seconds it lives unless renewed")] = None
    adopt: Annotated[bool, Field(description="take over the live lease of this user and `holder`, under a new id; a slug then takes no new one")] = (
        False
    )


class Renewal(_Asked):
    """Hold it for longer."""

    ttl_s: Annotated[float | None, Field(gt=0, le=86400, allow_inf_nan=False, description="seconds from now")] = None


class Problem(BaseModel):
    """RFC 9457. Some codes carry more members than these."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:nvcache:error:unknown-model"])
    title: str
    status: int
    detail: str = Field(description="one sentence: cannot … : why")
    code: Code
    hint: str = Field(description="what to do about it")
    retryable: bool
    retry_after_s: float | None


class Progress(BaseModel):
    """How far it is; `bytes_done` counts what was here already, `bytes_fetched` only the network."""

    bytes_total: int
    bytes_done: int
    bytes_fetched: int
    files_total: int
    files_done: int
    rate: float = Field(description="bytes per second over the last seconds")
    eta_s: float | None


class Model(BaseModel):
    """A model on this node."""

    entry: str = Field(examples=[EXAMPLE_ENTRY], description="its name in every URL: <slug>@<revision>")
    ref: str = Field(examples=[f"{EXAMPLE_REF}@{EXAMPLE_REVISION}"])
    revision: str = Field(examples=[EXAMPLE_REVISION])
    state: ModelState
    files: int
    bytes: int
    path: str | None = Field(description="the flat directory; only while ready")
    hub_cache: str | None = Field(description="the directory for HF_HUB_CACHE; only while ready")
    hub_id: str | None = Field(description="its name in the HuggingFace view")
    pinned: bool
    leases: int
    in_use: bool = Field(description="a process of the node has files of it open or mapped, with or without a lease; looked up every half minute")
    verified_at: str | None
    checked_at: str | None
    last_used: datetime | None
    warnings: list[str]
    unproven: int = Field(description="files of which the source publishes no digest (first-use)")
    progress: Progress | None
    job: str | None = Field(description="the job that works on it")
    error: Problem | None
    fetched_bytes: int = Field(description="over the network, by the fill that made it ready; 0 for a hit")
    seconds: float
    note: str | None


class SelectionView(BaseModel):
    """The patterns it was fetched with."""

    include: list[str]
    exclude: list[str]


class LeftOutView(BaseModel):
    """A file of the repository that was not taken."""

    path: str
    size: int


class CheckView(BaseModel):
    """One file and what its bytes were compared with."""

    path: str
    size: int
    sha256: str
    check: Check
    source: str | None = Field(description="the digest that the source publishes, as <algorithm>:<hex>")


class ManifestView(BaseModel):
    """Where the files came from and how each was proven."""

    endpoint: str
    asked: str
    commit: str | None = Field(description="the Hub's commit, where a mirror says which one it is a copy of")
    selection: SelectionView
    left_out: list[LeftOutView]
    parsed: bool = Field(description="whether safetensors headers and indexes were checked")
    checks: list[CheckView]


class HolderView(BaseModel):
    """Who holds a model, and until when if it is not renewed."""

    lease: str
    holder: str
    expires: datetime


class ModelDetail(Model):
    """A model with its files and who holds it."""

    holders: list[HolderView] = Field(description="its leases, soonest to run out first; all of them for an admin, else the caller's own")
    manifest: ManifestView | None


class EventView(BaseModel):
    """Something that happened. A phase began `at`; anything else happened then, and `seconds` looks back."""

    at: datetime
    kind: Kind
    seconds: float | None = Field(description="how long it took; None for a moment")
    bytes: int | None
    count: int | None = Field(description="files, requests or times")
    rate: float | None = Field(description="bytes per second")
    source: str | None = Field(description="where bytes came from")
    code: str | None
    what: str | None = Field(description="in words")
    who: str | None = Field(description="who asked, or holds it; for admins")
    job: str | None
    revision: str | None
    going: bool = Field(description="it is not over yet")
    slowest: bool = Field(description="no other phase of its job took longer")


class Timeline(BaseModel):
    """What happened to a model, the oldest first; bounded, what came first is forgotten first."""

    entry: str
    events: list[EventView]


class Models(BaseModel):
    """Every model on the node."""

    models: list[Model]


class Job(BaseModel):
    """A piece of long work."""

    id: str
    kind: str = Field(examples=["fill"])
    ref: str
    entry: str | None = Field(description="None until the reference is resolved")
    state: JobState
    created_at: datetime
    ended_at: datetime | None
    progress: Progress
    error: Problem | None
    seconds: float
    repaired_chunks: int
    bad_files: list[str]
    cached_before: int | None = Field(description="bytes in the page cache just before each piece of a verification was read, added up")
    cached_after: int | None = Field(description="and just after: reading back neither fills nor empties it")
    note: str | None = Field(description="what somebody may want to know, such as that the source changed meanwhile")


class Jobs(BaseModel):
    """Running jobs, and those that ended not long ago."""

    jobs: list[Job]


class Accepted(BaseModel):
    """Work has begun, or was already under way; `Location` names the job."""

    job: Job
    entry: str | None


class PlannedFile(BaseModel):
    """A file that making ready would take, and whether its bytes are here already."""

    path: str
    size: int
    here: bool


class DryRunView(BaseModel):
    """What making a model ready would do."""

    entry: str
    ref: str
    revision: str
    files: int
    bytes: int
    bytes_here: int
    bytes_to_fetch: int
    left_out: list[LeftOutView]
    seconds: float | None
    fits: bool
    would_evict: list[str]
    refusal: Problem | None
    paths: list[PlannedFile]


class EvictWish(_Asked):
    """Room to be made."""

    need_bytes: Annotated[int, Field(gt=0, le=2**63 - 1, description="bytes that are to be available afterwards")]
    dry_run: Annotated[bool, Field(description="only say which models would be removed")] = False


class VerifyWish(_Asked):
    """How to read a model back."""

    bandwidth: Annotated[
        int | None, Field(gt=0, le=2**63 - 1, description="bytes a second at most; as fast as the disks go if left out, which keeps them busy")
    ] = None


class VictimView(BaseModel):
    """A model that makes way. `frees` is what its going frees after those before it; `in_use`: a process has files of it open."""

    entry: str
    frees: int
    last_used: datetime | None
    in_use: bool


class HeldView(BaseModel):
    """A model that takes room and must stay, and why, in words."""

    entry: str
    bytes: int
    held: list[str]


class EvictionView(BaseModel):
    """What goes, or went, to make room; `short` is what was missing of `need`, all in bytes."""

    need: int
    short: int
    freed: int
    enough: bool
    victims: list[VictimView]
    in_the_way: list[HeldView]


class Lease(BaseModel):
    """A hold on a model; renew it before `expires`."""

    lease: str
    entry: str
    holder: str
    path: str
    hub_cache: str | None
    expires: datetime


class Leases(BaseModel):
    """Every lease on the node."""

    leases: list[Lease]


class Space(BaseModel):
    """The store's room in bytes."""

    limit: int = Field(description="the most it may hold")
    used: int
    reserved: int = Field(description="promised to fills, not yet on the disk")
    free: int = Field(description="of the file system")
    total: int = Field(description="of the file system")
    quarantined: int = Field(description="part of `used`: what went bad, until it is repaired")
    min_free: int = Field(description="what stays free on the file system for others")
    high_mark: int = Field(description="`used` and `reserved` above which models are evicted")
    low_mark: int = Field(description="down to which they are evicted then")


class Tuned(BaseModel):
    """One setting of a block queue that the table wants: `read_ahead` (bytes), `scheduler`, `rq_affinity`."""

    device: str | None = Field(description="the device whose queue it is", examples=["/dev/md127"])
    setting: str
    was: int | str | None = Field(description="before nvcache looked at it; null where it could not be read")
    wanted: int | str
    now: int | str | None = Field(description="as the kernel says; not what is wanted only with a warning W04")


class Stripe(BaseModel):
    """What the store lies on. More fields come from whoever looks after the disks: case, filesystem, array, members, mount, disks, warnings, …"""

    model_config = ConfigDict(extra="allow")

    backend: str | None = Field(description="directory, md or lvm; null while nothing is known")
    state: StripeStatus = Field(description="the store can be used while it is mounted")
    code: str | None = Field(description="why it is not, or what to know about it; docs/troubleshooting.md explains each", examples=["N03"])
    reason: str = Field(description="the same in words; may be empty")
    generation: int = Field(description="grows with every change of the state")
    fs_uuid: str | None = Field(description="which contents; null for a directory that somebody else looks after")
    path: str | None = Field(description="the store's directory, while it is mounted")
    direct_io: bool = Field(description="whether files are written around the page cache")
    space: dict[str, int] = Field(description="total, free, used and limit in bytes", examples=[{"total": 0, "free": 0, "used": 0, "limit": 0}])
    health: str = Field(description="ok, or what is wrong")
    tuning: list[Tuned] = Field([], description="what was set of the stripe's block queues when it was mounted")


class SourceView(BaseModel):
    """One kind of source as the daemon reaches it."""

    scheme: Scheme
    endpoint: str | None = Field(description="None where there is none: directories")
    token: bool = Field(description="whether the daemon has one; for Azure a connection string, a key or a SAS, identities apart")
    proxies: dict[str, str] = Field(
        description="host[:port] by scheme (http, https, all); credentials are left out", examples=[{"https": "proxy:3128"}]
    )
    no_proxy: bool = Field(description="whether NO_PROXY makes exceptions")
    xet: bool = Field(description="whether files over 50 GB can be had")


class Sources(BaseModel):
    """Where models come from."""

    sources: list[SourceView]


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """Whether models can be asked for, and if not, why."""

    ready: bool
    problems: list[str]
    degraded: int = Field(description="models that are withdrawn until they are mended: bytes of them went bad, or are gone")


class Version(BaseModel):
    """The daemon and the API it speaks."""

    version: str
    api: Literal["v1"]


def _hub_name(alias: str | None) -> str | None:
    if alias is None:
        return None
    ref = parse_ref(alias)
    if ref.scheme is not Scheme.HF or ref.revision is not None or alias != ref.location:
        raise RequestError(Code.BAD_REFERENCE, f"cannot use alias {alias!r}: an alias has the form org/name")
    return alias


EVENTS: dict[str, Any] = {
    "description": "server-sent events: a snapshot, then changes; `data` is a Model as JSON. When the node's disks go away the last is a `problem`",
    "content": {
        "text/event-stream": {
            "schema": {
                "type": "object",
                "required": ["id", "event", "data"],
                "properties": {
                    "id": {"type": "string"},
                    "event": {"enum": ["snapshot", "change", "problem"]},
                    "data": {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": {"anyOf": [{"$ref": "#/components/schemas/Model"}, {"$ref": "#/components/schemas/Problem"}]},
                    },
                },
            }
        }
    },
}
PROBLEM: dict[str, Any] = {"description": "a problem", "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
PROBLEMS: dict[int | str, dict[str, Any]] = {"4XX": PROBLEM, "5XX": PROBLEM}
"""What every call may answer instead; `Problem` is among the components because `Model` has one."""
