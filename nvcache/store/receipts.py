"""Receipts: what finished ingests became, kept until their entry has a manifest. They prove nothing; who believes one has read the blob.

They tell a resumed fill which blob a file became where the source publishes no SHA-256. They are not synced to the disk: a lost one costs a fetch.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass

import xxhash

from nvcache.store.files import disk_errors
from nvcache.store.layout import Layout


@dataclass(frozen=True, slots=True)
class Receipt:
    """The SHA-256 (hex) of what an ingest became, and its chunk digests (packed XXH3-64, little endian)."""

    sha256: str
    chunks: bytes


def write_receipt(layout: Layout, key: str, receipt: Receipt) -> None:
    """Note what the ingest `key` became. Raises `SpaceError`, `DiskError`."""
    body = json.dumps({"sha256": receipt.sha256, "chunks": base64.b64encode(receipt.chunks).decode()})
    half = layout.receipts / f".tmp-{secrets.token_hex(8)}"
    with disk_errors(f"note the blob {receipt.sha256}"):
        try:
            half.write_text(json.dumps({"body": body, "check": xxhash.xxh3_64_hexdigest(f"{key}{body}".encode())}))
            os.replace(half, layout.receipts / key)  # noqa: PTH105 - the same as its neighbours
        except OSError:
            with suppress(OSError):  # the first error is the one to tell
                half.unlink()
            raise


def read_receipt(layout: Layout, key: str) -> Receipt | None:
    """What the ingest `key` became; None when that is not known for certain. Raises `DiskError`."""
    with disk_errors(f"read the receipt {key}"):
        try:
            raw = (layout.receipts / key).read_bytes()
        except FileNotFoundError:
            return None
    try:
        outer = json.loads(raw)
        if outer["check"] != xxhash.xxh3_64_hexdigest(f"{key}{outer['body']}".encode()):
            return None
        body = json.loads(outer["body"])
        return Receipt(body["sha256"], base64.b64decode(body["chunks"], validate=True))
    except (ValueError, KeyError, TypeError):
        return None


def drop_receipt(layout: Layout, key: str) -> None:
    """Forget the receipt `key`, if there is one. Raises `DiskError`."""
    with disk_errors(f"drop the receipt {key}"):
        (layout.receipts / key).unlink(missing_ok=True)


def receipt_keys(layout: Layout) -> list[str]:
    """The ingest keys that have receipts. Raises `DiskError`."""
    with disk_errors("list receipts"):
        return [entry.name for entry in os.scandir(layout.receipts)]
