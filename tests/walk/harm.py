"""What goes wrong with the bytes of a node, and what the daemon makes of it."""

from __future__ import annotations

import os
from typing import Any

from tests.walk.disk import Stamp, stamp
from tests.walk.ground import until
from tests.walk.known import ENDED, NO_ROOM, Key, Known, entry


class Harm(Known):
    """Damages files, has the daemon look, and waits for what it does about them."""

    def damage(self, key: Key, kind: str, pick: int) -> str:
        """A disk or a person does to a file of it what nobody should."""
        path, sha256 = sorted(self.disk.expected(*key).items())[pick % len(self.on.truth[key])]
        blob = self.disk.blob(sha256)
        if not blob.is_file() or sha256 in self.hurt:
            return "none"
        size = blob.stat().st_size
        match kind:
            case "flip":
                with blob.open("r+b", buffering=0) as file:
                    at = pick * 7919 % size
                    byte = os.pread(file.fileno(), 1, at)
                    os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)
                    os.fsync(file.fileno())
            case "truncate":
                os.truncate(blob, size // 2)
            case "unlink":
                blob.unlink()
                self.apart.add(sha256)
            case "cut":
                file_shown = self.on.store / "models" / f"hf--acme--{key[0]}" / key[1] / path
                if not file_shown.exists():
                    return "none"
                file_shown.unlink()
                self.cut.add((key, path))
        self.hurt.add(sha256)
        self.withdrawn |= {other for other in self.ready if sha256 in self.disk.expected(*other).values()}
        if blob.exists() and kind != "cut":
            self.rot.add(stamp(blob.stat()))
        return path

    def look(self, key: Key) -> str:
        """Ask for it until the daemon sees what is wrong with it, if it can see that without reading; and then until that is mended, if it can be."""
        self.target = key
        if not self.visible(key):
            return "nothing to see"
        until(lambda: self.state_of(key)["state"] != "ready" or not self.visible(key), f"{key} is withdrawn")
        return f"{self.mended(key)}, others {[self.mended(other) for other in self.sharers(key) if other in self.withdrawn]}"

    def visible(self, key: Key) -> bool:
        """Whether one of its files is gone, or of another size, where it is shown."""
        if any(one == key for one, _ in self.cut):
            return bool(self._gone(key))
        for path, sha256 in self.disk.expected(*key).items():
            blob = self.disk.blob(sha256)
            if sha256 in self.hurt and (not blob.exists() or blob.stat().st_size != len(self.on.truth[key][path])):
                return True
        return False

    def _gone(self, key: Key) -> list[str]:
        view = self.on.store / "models" / f"hf--acme--{key[0]}" / key[1]
        return [path for one, path in self.cut if one == key and not (view / path).exists()]

    def verify(self, key: Key) -> str:
        """Have every byte of it read."""
        self.target, was_hurt, found = key, self.is_hurt(key), self.stamps(key)
        job = self.on.ask("POST", f"/v1/models/{entry(key)}/verify")["job"]["id"]
        ended = self.end_of(job) if not self.down else self.until_read(job)
        self.rot -= found
        if ended["state"] == "done":
            assert was_hurt or not ended["repaired_chunks"], f"good bytes were condemned: {ended}"
            self.healed(key)
            return f"{ended['repaired_chunks']} chunks repaired"
        assert was_hurt, ended
        assert self.state_of(key)["path"] is None
        return f"{self.mended(key)}, others {[self.mended(other) for other in self.sharers(key) if other in self.withdrawn]}"

    def until_read(self, job: str) -> dict[str, Any]:
        """The job once it is over, or fetches while there is nobody to fetch from."""
        last: dict[str, Any] = {}

        def over() -> bool:
            last.update(self.on.ask("GET", f"/v1/jobs/{job}"))
            return last["state"] in ENDED or (last["state"] != "queued" and bool(last["bad_files"]))

        until(over, f"job {job} has read")
        return last

    def stamps(self, key: Key) -> set[Stamp]:
        """What its files are now."""
        blobs = [self.disk.blob(sha256) for sha256 in self.disk.expected(*key).values()]
        return {stamp(blob.stat()) for blob in blobs if blob.exists()}

    def mended(self, key: Key) -> str:
        """Wait until it is whole again, if there is somebody to fetch it from and room; else it says why not and is not served."""
        name, commit = key
        if self.down or self.on.foreign.exists() or self.mapped:
            return "not now"
        has = commit in self.on.repo(name).commits

        def over() -> bool:
            model = self.state_of(key)
            lost = not has and model["state"] == "degraded" and model["error"]["code"] == "revision-not-found"
            full = model["state"] == "degraded" and (model["error"] or {}).get("code") in NO_ROOM
            return bool(model["state"] == "ready" or lost or full or (model["job"] is None and self._failed_for(key)))

        until(over, f"{key} is mended, or why it cannot be is said: {self.state_of(key)}")
        if self.state_of(key)["state"] == "ready":
            self.healed(key)
            return "mended"
        return "cannot be mended"

    def _failed_for(self, key: Key) -> str | None:
        """The code of the last job of it, where that failed for want of room or of the revision."""
        jobs = [job for job in self.on.ask("GET", "/v1/jobs")["jobs"] if job["entry"] == entry(key)]
        error = max(jobs, key=lambda job: str(job["created_at"]))["error"] if jobs else None
        return error["code"] if error and error["code"] in NO_ROOM | {"revision-not-found"} else None

    def healed(self, key: Key) -> None:
        """It was read whole, or is back: nothing of it may be wrong any more but what nobody had the daemon look at."""
        blobs = {sha256: self.disk.blob(sha256) for sha256 in self.disk.expected(*key).values()}
        self.hurt -= {sha256 for sha256, blob in blobs.items() if blob.exists() and stamp(blob.stat()) not in self.rot}
        if self.hurt.isdisjoint(blobs):
            self.withdrawn.discard(key)
        self.cut = {(one, path) for one, path in self.cut if one != key}
        self.saw(self.state_of(key))
