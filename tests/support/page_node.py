"""A node with something in every state, as the API tells it: what the page for people is looked at with. It is data; nothing serves it here."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from tests.support.stub_daemon import StubDaemon, problem

GB = 10**9
COMMIT = "c1899de289a04d12100db370d81485cdf75e47ca"


def before(**ago: float) -> str:
    """A moment some time ago, as the API writes it; negative numbers are to come."""
    return (datetime.now(UTC) - timedelta(**ago)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def progress(total: float, done: float, rate: float = 0.0, eta: float | None = None) -> dict[str, Any]:
    """A fill that is so far."""
    counts = {"bytes_total": int(total), "bytes_done": int(done), "bytes_fetched": int(done), "files_total": 30, "files_done": 12}
    return {**counts, "rate": rate, "eta_s": eta}


def model(name: str, state: str = "ready", **more: Any) -> dict[str, Any]:
    """A model as `GET /v1/models` tells it."""
    entry, ready = f"hf--{name.replace('/', '--')}@{COMMIT}", state == "ready"
    base = {
        "entry": entry,
        "ref": f"hf://{name}@{COMMIT}",
        "revision": COMMIT,
        "state": state,
        "files": 30,
        "bytes": 141 * GB,
        "path": f"/var/lib/nvcache/mnt/store/models/{entry.replace('@', '/')}" if ready else None,
        "hub_cache": "/var/lib/nvcache/mnt/store/hub" if ready else None,
        "hub_id": name,
        "pinned": False,
        "leases": 0,
        "in_use": False,
        "verified_at": before(days=2) if ready else None,
        "checked_at": None,
        "last_used": before(minutes=7) if ready else None,
        "warnings": [],
        "unproven": 0,
        "progress": None,
        "job": None,
        "error": None,
        "fetched_bytes": 141 * GB if ready else 0,
        "seconds": 74.0 if ready else 0.0,
        "note": None,
    }
    return base | more


def job(name: str, state: str, kind: str = "fill", **more: Any) -> dict[str, Any]:
    """A job as `GET /v1/jobs` tells it."""
    base = {
        "id": f"{kind}-{name}-{state}",
        "kind": kind,
        "ref": f"hf://{name}",
        "entry": None,
        "state": state,
        "created_at": before(seconds=40),
        "ended_at": None,
        "progress": progress(0, 0),
        "error": None,
        "seconds": 40.0,
        "repaired_chunks": 0,
        "bad_files": [],
        "cached_before": None,
        "cached_after": None,
        "note": None,
    }
    return base | more


UNREACHABLE = problem(
    "source-unreachable",
    "cannot fetch hf://mistralai/Mistral-Small-24B: no route to huggingface.co",
    hint="the node cannot reach the source: look at its proxy and its DNS",
)


def models() -> list[dict[str, Any]]:
    """One in every state that is seen for long."""
    going = progress(70.2 * GB, 29.9 * GB, 1.24 * GB, 32.5)
    return [
        model("meta-llama/Llama-3.3-70B-Instruct", pinned=True, leases=2, checked_at=before(hours=3)),
        model(
            "Qwen/Qwen3-0.6B",
            in_use=True,
            bytes=int(1.5 * GB),
            files=10,
            unproven=3,
            note="the source was down: the revision resolved last is served",
        ),
        model("Qwen/Qwen3-32B", "fetching", bytes=int(70.2 * GB), progress=going, job="1"),
        model("google/gemma-3-27b-it", "verifying", bytes=54 * GB, progress=progress(54 * GB, 50 * GB, 6.1 * GB, 0.7), job="2"),
        model("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "queued", bytes=int(3.6 * GB)),
        model("mistralai/Mistral-Small-24B", "failed", bytes=47 * GB, error=UNREACHABLE),
        model("openai/gpt-oss-20b", "degraded", bytes=41 * GB, warnings=["2 chunks of model-00001-of-00003.safetensors went bad"]),
    ]


def jobs() -> list[dict[str, Any]]:
    """Two that run and two that ended."""
    going = progress(70.2 * GB, 29.9 * GB, 1.24 * GB, 32.5)
    return [
        job("Qwen/Qwen3-32B", "fetching", progress=going),
        job("openai/gpt-oss-20b", "fetching", "repair", progress=progress(41 * GB, 40.9 * GB, 0.3 * GB, 1.0)),
        job("Qwen/Qwen3-0.6B", "done", ended_at=before(minutes=8), seconds=3.2, progress=progress(1.5 * GB, 1.5 * GB)),
        job("mistralai/Mistral-Small-24B", "failed", ended_at=before(minutes=2), error=UNREACHABLE),
    ]


SPACE = {
    "limit": 1920 * GB,
    "used": 640 * GB,
    "reserved": 95 * GB,
    "free": 2900 * GB,
    "total": 3840 * GB,
    "quarantined": 34 * 10**6 * 100,
    "min_free": 384 * GB,
    "high_mark": 1824 * GB,
    "low_mark": 1728 * GB,
}
STRIPE = {
    "backend": "md",
    "state": "mounted",
    "code": "W01",
    "reason": "an allowed disk is not in the stripe",
    "generation": 4,
    "fs_uuid": "8a4e2a0c-1d0d-4f43-8a57-0f0c7f4c1c11",
    "path": "/var/lib/nvcache/mnt/store",
    "direct_io": True,
    "space": {"total": 3840 * GB, "free": 2900 * GB, "used": 640 * GB, "limit": 1920 * GB},
    "health": "ok",
    "tuning": [],
    "filesystem": "xfs",
    "array": "/dev/md127",
    "mount": "/var/lib/nvcache/mnt",
    "members": ["/dev/nvme0n1", "/dev/nvme1n1"],
    "warnings": ["W01: /dev/nvme2n1 is allowed and not in the stripe"],
    "disks": [
        *(
            {
                "name": f"nvme{i}n1",
                "serial": f"S64FNE0R10{i}",
                "model": "Microsoft NVMe Direct Disk v2",
                "size": 1920 * GB,
                "verdict": "ours",
                "code": None,
                "reason": "member of our md stripe nvcache",
            }
            for i in range(2)
        ),
        {
            "name": "nvme2n1",
            "serial": "S64FNE0R109",
            "model": "Microsoft NVMe Direct Disk v2",
            "size": 1920 * GB,
            "verdict": "refused",
            "code": "D07",
            "reason": "it holds an ext4 file system that is not ours",
        },
    ],
}


def leases() -> list[dict[str, Any]]:
    """Two holders of the first model."""
    entry = str(models()[0]["entry"])
    return [
        {"lease": str(i), "entry": entry, "holder": holder, "path": "/x", "hub_cache": None, "expires": before(minutes=-9)}
        for i, holder in enumerate(["uid=0/pid=4711/default/vllm-llama-0", "uid=0/pid=4712/default/vllm-llama-1"])
    ]


def tell(stub: StubDaemon) -> None:
    """Have a scripted daemon tell all this. It knows no events, so that the page asks every two seconds."""
    stub.answer("GET /version", {"version": "0.1.0", "api": "v1"})
    stub.answer("GET /v1/models", {"models": models()})
    stub.answer("GET /v1/jobs", {"jobs": jobs()})
    stub.answer("GET /v1/space", SPACE)
    stub.answer("GET /v1/stripe", STRIPE)
    stub.answer("GET /v1/leases", {"leases": leases()})
    stub.answer("GET /readyz", {"ready": True, "problems": []})
