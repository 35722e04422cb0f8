"""Where everything is below the store's root. Path arithmetic only: it touches no file.

::

    format.json  .lock
    blobs/sha256/<2 hex>/<64 hex>     complete, verified, read-only
    ingest/<key>/{data,journal}       one blob being made            ingest/plans/<entry>.json   what a fill needs
    manifests/<entry>.json            written last: the entry is ready
    models/<slug>/<revision>/…        flat view                      hub/models--org--name/…     HuggingFace view
    kaito/<name>/…                    flat view under the name that KAITO looks for
    state/<entry>.json  use/<entry>  timelines/<slug>  leases/<id>.json  quarantine/  tmp/
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nvcache.core.kaito import kaito_name
from nvcache.core.ref import EntryId, parse_ref
from nvcache.errors import Code, IntegrityError

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Layout:
    """The store's tree over `root`. Names are checked where they are made into paths, so that no caller can step outside."""

    root: Path

    @property
    def format_file(self) -> Path:
        """`{"format": 1, "store_id": …}`, written once."""
        return self.root / "format.json"

    @property
    def lock(self) -> Path:
        """Locked by the daemon that uses the store."""
        return self.root / ".lock"

    @property
    def blobs(self) -> Path:
        """The 256 folders of blobs."""
        return self.root / "blobs" / "sha256"

    @property
    def ingest(self) -> Path:
        """Blobs being made, one folder each."""
        return self.root / "ingest"

    @property
    def plans(self) -> Path:
        """Fills in progress."""
        return self.root / "ingest" / "plans"

    @property
    def receipts(self) -> Path:
        """What finished ingests became, until their entry is ready (`store.receipts`)."""
        return self.root / "ingest" / "receipts"

    @property
    def manifests(self) -> Path:
        """Ready entries."""
        return self.root / "manifests"

    @property
    def models(self) -> Path:
        """Flat views."""
        return self.root / "models"

    @property
    def hub(self) -> Path:
        """The HuggingFace cache tree; only `models--…` folders are in it."""
        return self.root / "hub"

    @property
    def kaito(self) -> Path:
        """Flat views under the names KAITO looks for."""
        return self.root / "kaito"

    @property
    def state(self) -> Path:
        """Pins, aliases and names of entries."""
        return self.root / "state"

    @property
    def use(self) -> Path:
        """Empty files whose mtime is an entry's last use."""
        return self.root / "use"

    @property
    def timelines(self) -> Path:
        """What happened to each model (`store.timeline`)."""
        return self.root / "timelines"

    @property
    def leases(self) -> Path:
        """Holds on entries."""
        return self.root / "leases"

    @property
    def quarantine(self) -> Path:
        """What went bad, with a note each; never served."""
        return self.root / "quarantine"

    @property
    def condemned(self) -> Path:
        """The blobs that are on their way to quarantine (`store.condemn`)."""
        return self.root / "quarantine" / "condemned.json"

    @property
    def tmp(self) -> Path:
        """Half-made and half-removed things; emptied at every start."""
        return self.root / "tmp"

    def blob(self, sha256: str) -> Path:
        """The blob of that digest, in hex. Raises `IntegrityError` (degraded) when it is not a SHA-256."""
        if not _SHA256.fullmatch(sha256):
            raise IntegrityError(Code.DEGRADED, f"cannot name the blob {sha256[:80]!r}: it is not a SHA-256")
        return self.root / f"blobs/sha256/{sha256[:2]}/{sha256}"  # one step: it is done for every file, often

    def manifest(self, entry: EntryId) -> Path:
        """The file that makes `entry` ready."""
        return self.manifests / f"{entry}.json"

    def plan(self, entry: EntryId) -> Path:
        """What a fill of `entry` needs."""
        return self.plans / f"{entry}.json"

    def view(self, entry: EntryId) -> Path:
        """The flat view of `entry`: what a pod gives to `--model`."""
        return self.root / f"models/{entry.slug}/{entry.revision}"

    def state_file(self, entry: EntryId) -> Path:
        """Pin, alias and names of `entry`."""
        return self.state / f"{entry}.json"

    def use_file(self, entry: EntryId) -> Path:
        """The file whose mtime is the last use of `entry`."""
        return self.use / str(entry)

    def timeline(self, slug: str) -> Path:
        """What happened to the revisions of `slug`."""
        return self.timelines / slug

    def hub_repo(self, hub_id: str) -> Path:
        """The folder of `org/name` in the HuggingFace view. Raises `RequestError` (bad-reference) when that is not a Hub name."""
        return self.hub / f"models--{parse_ref(f'hf://{hub_id}').location.replace('/', '--')}"

    def kaito_view(self, hub_id: str) -> Path:
        """The flat view of `org/name` for KAITO. Raises `RequestError` (bad-reference) when that is not a Hub name."""
        return self.kaito / kaito_name(parse_ref(f"hf://{hub_id}").location)

    def ingest_dir(self, key: str) -> Path:
        """The folder of one blob being made; `key` comes from `store.ingest.ingest_key`."""
        return self.ingest / key
