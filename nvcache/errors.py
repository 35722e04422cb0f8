"""The exception tree and the table of stable error codes. It maps nothing to HTTP or exit codes; `api.problems` and `__main__` do.

Roots say who must act::

    NvcacheError
    ├── RequestError      the caller: a reference, an entry or a lease that cannot be served as asked
    ├── ConfigError       the operator: settings, the store directory, sockets
    ├── DiskError         the node: I/O errors, a disk that does not answer
    ├── SourceError       the remote: transient or permanent, `retryable` says which
    ├── IntegrityError    the bytes are wrong; never retried from the same copy
    ├── SpaceError        never fits, or not now
    └── Interrupted       nobody: cancelled, or the daemon is stopping

`str(error)` begins "cannot …" and ends with why. `hint` says what to do. What is raised carries one `Code`; codes never change meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SPENT = frozenset({"EMFILE", "ENFILE", "ENOMEM"})  # of errno: they say nothing about a disk, this process or machine is short of something


class Code(StrEnum):
    """Stable names of everything that can go wrong; the whole of them is documented in docs/errors.md (generated)."""

    BAD_REFERENCE = "bad-reference"
    BAD_REQUEST = "bad-request"
    UNKNOWN_MODEL = "unknown-model"
    UNKNOWN_JOB = "unknown-job"
    UNKNOWN_LEASE = "unknown-lease"
    UNKNOWN_BLOB = "unknown-blob"
    AMBIGUOUS_REVISION = "ambiguous-revision"
    NOT_READY = "not-ready"
    LEASED = "leased"
    PINNED = "pinned"
    IN_USE = "in-use"
    ALIAS_CONFLICT = "alias-conflict"
    NOT_ALLOWED = "not-allowed"
    UNAUTHORIZED = "unauthorized"

    BAD_CONFIG = "bad-config"
    STORE_FOREIGN = "store-foreign"
    STORE_FORMAT = "store-format"
    STORE_LOCKED = "store-locked"
    STORE_READONLY = "store-readonly"
    STORE_UNFIT = "store-unfit"
    SOCKET_IN_USE = "socket-in-use"
    DAEMON_UNREACHABLE = "daemon-unreachable"
    STARTING = "starting"

    DISK_IO = "disk-io"
    DISK_STALLED = "disk-stalled"
    NO_STRIPE = "no-stripe"
    DISKS_REFUSED = "disks-refused"
    DISKS_BUSY = "disks-busy"
    TOOL_MISSING = "tool-missing"
    TOOL_FAILED = "tool-failed"
    TOOL_STALLED = "tool-stalled"

    REPOSITORY_NOT_FOUND = "repository-not-found"
    REVISION_NOT_FOUND = "revision-not-found"
    FILE_NOT_FOUND = "file-not-found"
    GATED = "gated"
    BAD_TOKEN = "bad-token"  # noqa: S105 - the name of an error, not a secret
    SOURCE_FORBIDDEN = "source-forbidden"
    SOURCE_UNREACHABLE = "source-unreachable"
    SOURCE_STALLED = "source-stalled"
    SOURCE_BUSY = "source-busy"
    SOURCE_FAILED = "source-failed"
    SOURCE_TLS = "source-tls"
    SOURCE_PROTOCOL = "source-protocol"
    SOURCE_CHANGED = "source-changed"
    NEEDS_XET = "needs-xet"
    ARCHIVED = "archived"
    NO_DIGEST = "no-digest"

    DIGEST_MISMATCH = "digest-mismatch"
    SIZE_MISMATCH = "size-mismatch"
    POINTER_FILE = "pointer-file"
    BAD_SAFETENSORS = "bad-safetensors"
    BAD_INDEX = "bad-index"
    HOSTILE_NAME = "hostile-name"
    LISTING_CONFLICT = "listing-conflict"
    DEGRADED = "degraded"

    TOO_LARGE = "too-large"
    FULL = "full"
    DISK_FULL = "disk-full"

    WORKER_DIED = "worker-died"
    CANCELLED = "cancelled"
    STOPPING = "stopping"
    TIMEOUT = "timeout"
    UNREADABLE = "unreadable"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class CodeFacts:
    """What a code means, what to do about it, and whether asking again may help."""

    meaning: str
    hint: str
    retryable: bool = False


FACTS: dict[Code, CodeFacts] = {
    Code.BAD_REFERENCE: CodeFacts(
        "the model reference cannot be read", "write it as [hf://]org/name[@revision], az://account/container/prefix or file:///absolute/dir"
    ),
    Code.BAD_REQUEST: CodeFacts("the request is not of the API's form", "`GET /openapi.json` names the fields this call takes"),
    Code.UNKNOWN_MODEL: CodeFacts("the node has no such model", "make it ready with `nvcache warm REF`; `nvcache ls` shows what is here"),
    Code.UNKNOWN_JOB: CodeFacts("no such job", "jobs are kept for an hour; `nvcache jobs` lists them"),
    Code.UNKNOWN_LEASE: CodeFacts("no such lease; it was released or ran out", "take a new lease before loading"),
    Code.UNKNOWN_BLOB: CodeFacts("no model that is ready here has these bytes", "fetch them from their source"),
    Code.AMBIGUOUS_REVISION: CodeFacts("several revisions of the model are here", "name one as <slug>@<revision>"),
    Code.NOT_READY: CodeFacts("the model is not ready yet", "wait for it: `nvcache warm REF`", retryable=True),
    Code.LEASED: CodeFacts(
        "somebody holds the model", "wait until the leases shown are released or run out, or break them with `nvcache leases --break`", retryable=True
    ),
    Code.PINNED: CodeFacts("the model is pinned", "run `nvcache unpin REF` first"),
    Code.IN_USE: CodeFacts("a process on the node has the model open", "stop the process that reads it", retryable=True),
    Code.ALIAS_CONFLICT: CodeFacts("the alias names another source's model", "choose another alias or remove the other model"),
    Code.NOT_ALLOWED: CodeFacts("this socket may not do that", "run as the daemon's user, or name the admin socket with --socket"),
    Code.UNAUTHORIZED: CodeFacts(
        "the bearer token is missing or wrong",
        "name the file with the daemon's token in NVCACHE_TOKEN_FILE; other clients send Authorization: Bearer",
    ),
    Code.BAD_CONFIG: CodeFacts("the settings cannot be used", "correct the setting named in the message"),
    Code.STORE_FOREIGN: CodeFacts("the store directory holds something else", "name an empty directory, or one that nvcache made"),
    Code.STORE_FORMAT: CodeFacts("the store has a format this version does not know", "use the nvcache version that wrote it, or another directory"),
    Code.STORE_LOCKED: CodeFacts("another daemon uses this store", "stop the other daemon, or give this one a store of its own"),
    Code.STORE_READONLY: CodeFacts("the store cannot be written", "remount it read-write or correct its owner"),
    Code.STORE_UNFIT: CodeFacts("the file system lacks something the store needs", "use a local XFS or ext4 file system"),
    Code.SOCKET_IN_USE: CodeFacts("the socket path is taken", "stop the daemon that answers there, or choose another --socket"),
    Code.DAEMON_UNREACHABLE: CodeFacts(
        "no daemon answers on the socket", "start one with `nvcache serve`, or name its socket with NVCACHE_SOCKET", retryable=True
    ),
    Code.STARTING: CodeFacts("the daemon has not finished starting", "ask again in a moment", retryable=True),
    Code.DISK_IO: CodeFacts("the disk failed a read or a write", "look at the kernel log of the node; replace the disk", retryable=True),
    Code.DISK_STALLED: CodeFacts("the disk does not answer", "look at the kernel log of the node", retryable=True),
    Code.NO_STRIPE: CodeFacts("the node's cache disks are not mounted just now", "`nvcache disks` shows each disk and why", retryable=True),
    Code.DISKS_REFUSED: CodeFacts("the disks are not touched, for the reason given", "docs/troubleshooting.md has a remedy for each code"),
    Code.DISKS_BUSY: CodeFacts("another nvcache works on the disks", "wait for it to end, then try again", retryable=True),
    Code.TOOL_MISSING: CodeFacts("a program that nvcache needs for disks is not installed", "install the package named in the message"),
    Code.TOOL_FAILED: CodeFacts("a storage command failed", "look at its message and the kernel log of the node", retryable=True),
    Code.TOOL_STALLED: CodeFacts(
        "a storage command does not end; no second one is started", "look at the kernel log of the node; a reboot may be needed", retryable=True
    ),
    Code.REPOSITORY_NOT_FOUND: CodeFacts(
        "the repository does not exist, or is private and the token cannot see it",
        "check the name; for a private model give the daemon a token that may see it (HF_TOKEN or hf_token_path)",
    ),
    Code.REVISION_NOT_FOUND: CodeFacts("the repository has no such revision", "check the branch, tag or commit after the @"),
    Code.FILE_NOT_FOUND: CodeFacts("the source lists a file but does not have it", "the repository is incomplete; ask its owner"),
    Code.GATED: CodeFacts(
        "the model is gated and this account has no access",
        "accept its terms on the model's page, then give the daemon that account's token (HF_TOKEN or hf_token_path)",
    ),
    Code.BAD_TOKEN: CodeFacts(
        "the source refuses the credential", "replace the daemon's: for the Hub HF_TOKEN or hf_token_path, for Azure see docs/azure.md"
    ),
    Code.SOURCE_FORBIDDEN: CodeFacts("the source refuses access", "check the account's rights on the source"),
    Code.SOURCE_UNREACHABLE: CodeFacts(
        "the source cannot be reached", "check DNS, HTTPS_PROXY/NO_PROXY and egress rules; what is ready is still served", retryable=True
    ),
    Code.SOURCE_STALLED: CodeFacts("the source stopped sending", "it is tried again; check the network path", retryable=True),
    Code.SOURCE_BUSY: CodeFacts("the source asks to slow down", "wait; a token raises the Hub's limits", retryable=True),
    Code.SOURCE_FAILED: CodeFacts("the source answers with an error", "try again later; look at the source's status page", retryable=True),
    Code.SOURCE_TLS: CodeFacts("the source's certificate cannot be trusted", "set SSL_CERT_FILE to the private CA's bundle"),
    Code.SOURCE_PROTOCOL: CodeFacts(
        "the answer is not what the protocol promises",
        "a proxy or captive portal may answer instead of the source; check HF_ENDPOINT",
        retryable=True,
    ),
    Code.SOURCE_CHANGED: CodeFacts("the file changed at the source while it was fetched", "ask again: the new revision is fetched", retryable=True),
    Code.NEEDS_XET: CodeFacts("files over 50 GB cannot be had from the Hub over plain HTTP", "install the extra: pip install 'nvcache[xet]'"),
    Code.ARCHIVED: CodeFacts("a blob is in the archive tier and cannot be read", "bring it back first: az storage blob set-tier --tier Hot …"),
    Code.NO_DIGEST: CodeFacts(
        "the source publishes no digest for a file, and one is required",
        "put a SHA256SUMS beside the weights, upload with `azcopy --put-md5`, or copy the model with `nvcache mirror`",
    ),
    Code.DIGEST_MISMATCH: CodeFacts(
        "the bytes are not those the source published", "the source or a proxy serves wrong bytes; nothing of it was kept"
    ),
    Code.SIZE_MISMATCH: CodeFacts(
        "the file has not the length the source published", "the source or a proxy serves wrong bytes; nothing of it was kept"
    ),
    Code.POINTER_FILE: CodeFacts("the source sent a git-lfs pointer instead of the file", "the mirror lacks its LFS objects; fetch them there"),
    Code.BAD_SAFETENSORS: CodeFacts("a safetensors file is malformed", "the repository is broken; ask its owner, or exclude the file"),
    Code.BAD_INDEX: CodeFacts("the weights index names files that are not there", "the repository is incomplete; ask its owner"),
    Code.HOSTILE_NAME: CodeFacts(
        "a file name in the repository is not safe to create", "nothing was fetched; exclude the file if you trust the rest"
    ),
    Code.LISTING_CONFLICT: CodeFacts("the listing contradicts itself", "nothing was fetched; ask the repository's owner"),
    Code.DEGRADED: CodeFacts("bytes on the disk went bad", "`nvcache verify REF` repairs it from the source", retryable=True),
    Code.TOO_LARGE: CodeFacts("the model is larger than the cache can ever be", "raise max_bytes or choose a larger disk"),
    Code.FULL: CodeFacts("the cache is full just now", "unpin or remove models, end leases (`nvcache leases`), or raise max_bytes", retryable=True),
    Code.DISK_FULL: CodeFacts("the file system ran out of space", "free space on the store's file system", retryable=True),
    Code.WORKER_DIED: CodeFacts("a worker process died", "it is started again; look at the log for the reason", retryable=True),
    Code.CANCELLED: CodeFacts("the job was cancelled", "ask again to resume where it stopped", retryable=True),
    Code.STOPPING: CodeFacts("the daemon is stopping", "the fill resumes at the next start", retryable=True),
    Code.TIMEOUT: CodeFacts("it did not finish in the time given", "give a longer --timeout; the fill goes on in the daemon", retryable=True),
    Code.UNREADABLE: CodeFacts(
        "the model is ready, but the command does not see it or may not read it where it runs",
        "mount the store's models/ or hub/ read-only at the same path, with mountPropagation: HostToContainer",
    ),
    Code.INTERNAL: CodeFacts("a defect in nvcache", "report it with the daemon's log"),
}


class NvcacheError(Exception):
    """An expected failure: one sentence for a person, one code for a program, a hint and whether to try again.

    `facts` are extra members for the problem document and the log; they must never hold a secret.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        hint: str | None = None,
        retryable: bool | None = None,
        retry_after_s: float | None = None,
        facts: dict[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.hint = FACTS[code].hint if hint is None else hint
        self.retryable = FACTS[code].retryable if retryable is None else retryable
        self.retry_after_s = retry_after_s
        self.facts = facts or {}


class RequestError(NvcacheError):
    """The caller asked for something that cannot be done as asked."""


class ConfigError(NvcacheError):
    """The operator must change a setting, a directory or a socket."""


class DiskError(NvcacheError):
    """The node's disk failed or does not answer."""


class SourceError(NvcacheError):
    """The remote failed; `retryable` tells transient from permanent."""


class IntegrityError(NvcacheError):
    """The bytes are wrong. Nothing of them is served."""


class SpaceError(NvcacheError):
    """The model never fits, or does not fit just now."""


class Interrupted(NvcacheError):  # noqa: N818 - nobody made an error
    """Work stopped because it was cancelled or the daemon is stopping."""
