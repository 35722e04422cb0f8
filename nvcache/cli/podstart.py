"""What a ready model needs before a pod's engine may start: seen from here, held, in the page cache, named in a file. It makes no model ready."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from nvcache.cli import output
from nvcache.cli.daemon import Daemon, Json, problem_from, problem_of
from nvcache.cli.follow import Task
from nvcache.cli.progress import Amount
from nvcache.client import Lease, Prefetched, Problem, prefetch
from nvcache.client.reading import within
from nvcache.errors import Code, ConfigError, DiskError, NvcacheError, RequestError

UNSEEN = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM)  # the container's doing; anything else is the disk's
LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)  # of this process: the model is none the worse


@dataclass
class PodStart:
    """What `warm` was asked to do with what is ready. A context manager: leases that are not handed over end with it.

    `ttl` is in seconds, None for the daemon's default.
    """

    asked: Daemon
    lease: bool = False
    ttl: float | None = None
    page_cache: bool = False
    env_file: Path | None = None
    _held: list[Lease] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> PodStart:
        """Nothing is held yet."""
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def admit(self, task: Task) -> None:
        """Look at a task that has ended well, and hold its model; its `path` is from now on the one that is seen here. What fails is its problem."""
        if task.model is None or task.problem is not None:
            return
        if (state := task.model["state"]) != "ready":
            task.problem = task.model.get("error") or problem_from(Code.NOT_READY, f"cannot give a path for {task.label}: it is {state}")
            return
        try:
            if self.lease:
                held = self._stack.enter_context(self.asked.lease(task.model["entry"], ttl=self.ttl))
                self._held.append(held)
                output.say(f"{task.label}: held as {held.holder}")
            if self.lease or self.page_cache or self.env_file is not None:
                task.model = {**task.model, "path": seen(self.asked, task.model)}
        except (Problem, NvcacheError) as error:
            task.problem = problem_of(error)

    def read(self, task: Task) -> Prefetched | None:
        """Bring an admitted model into the page cache, if that was asked for. None when it was not, or could not be (maybe the task's problem)."""
        if not self.page_cache or task.model is None or task.problem is not None:
            return None
        label, path = task.label, task.model["path"]
        try:
            done = prefetch(path, on_progress=Amount(label, "into the page cache").update)
        except OSError as error:
            if error.errno in LIMITS:
                raise_it = "raise this container's limit (ulimit -n, ulimit -u, memory)"
                output.say(f"warning: {label}: cannot read it into the page cache: {error.strerror}; {raise_it}")
                return None
            task.problem = problem_of(_refused(Path(error.filename or path), error))
            return None
        _tell(label, done)
        return done

    def name(self, task: Task) -> None:
        """Write the variables of an admitted model, if a file was asked for. What fails is its problem."""
        if self.env_file is None or task.model is None or task.problem is not None:
            return
        lines = {"NVCACHE_MODEL": task.model["path"]}
        if task.model["hub_cache"] and _is_dir(Path(task.model["hub_cache"])):  # a name that leads nowhere would cost a loader its other models
            lines |= {"HF_HUB_CACHE": task.model["hub_cache"], "HF_HUB_OFFLINE": "1"}
        try:
            write_variables(self.env_file, lines)
        except ConfigError as error:
            task.problem = problem_of(error)

    def hand_over(self) -> None:
        """Leave the leases for their whole time to whoever adopts them under the same holder, such as `nvcache hold`."""
        for lease in self._held:
            lease.hand_over()


def write_variables(file: Path, lines: Mapping[str, str]) -> None:
    """Replace the file of variables whole, as who reads it may be starting. Raises `ConfigError` (bad-config)."""
    try:
        new = file.with_name(f".{file.name}.new")
        new.unlink(missing_ok=True)  # whatever stands there, a link or a pipe: it is not written through
        with new.open("x") as made:
            made.write("".join(f"{name}={shlex.quote(value)}\n" for name, value in lines.items()))
        new.replace(file)
    except ValueError as error:  # "" for one, as from a variable that is not set
        raise ConfigError(Code.BAD_CONFIG, f"cannot write the variables: {str(file)!r} is no name of a file") from error
    except OSError as error:
        hint = "name a file in a volume that this container may write, such as an emptyDir"
        raise ConfigError(Code.BAD_CONFIG, f"cannot write {file}: {error.strerror}", hint=hint) from error


def seen(asked: Daemon, model: Json) -> str:
    """The directory of a ready model that can be read here: the flat one, else, where only hub/ is mounted, its snapshot there.

    Raises `RequestError` (unreadable), `DiskError` (disk-io), `Problem`.
    """
    flat = Path(model["path"])
    refused = _look(flat)
    if refused is not None and model["hub_cache"] and _is_dir(Path(model["hub_cache"])):
        manifest = asked.get(f"/v1/models/{model['entry']}")["manifest"]
        commit = manifest["commit"] or model["revision"][:40]
        snapshot = Path(model["hub_cache"], f"models--{model['hub_id'].replace('/', '--')}", "snapshots", commit)
        flat, refused = snapshot, _look(snapshot)
    if refused is not None:
        raise _refused(flat, refused)
    return str(flat)


def _look(directory: Path) -> OSError | None:
    """Why nothing can be read in a directory; None when a file of it can be opened. Bounded, whatever its disk does."""

    def look() -> None:
        if not directory.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
        folders = os.walk(directory, onerror=_raised)
        next(Path(folder, name) for folder, _, names in folders for name in sorted(names)).open("rb").close()

    try:
        within(look)
    except OSError as error:
        return error
    except StopIteration:
        return FileNotFoundError(errno.ENOENT, "no file is in it", str(directory))
    return None


def _raised(error: OSError) -> None:
    raise error


def _refused(path: Path, error: OSError) -> NvcacheError:
    why = error.strerror or str(error)
    if error.errno not in UNSEEN:
        return DiskError(Code.DISK_IO, f"cannot read {path}: {why}")
    parent = next((above for above in path.parents if above.name in ("models", "hub")), path.parent)
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = f"uid {os.getuid()} needs to pass {parent} and read below it, as it may on the node: look at the mount, its modes and its labels"
    elif parent != path.parent and _is_dir(parent):
        hint = f"{parent} is here without it, so it was mounted before the node's disks: give the mount mountPropagation: HostToContainer"
    else:
        hint = f"mount the node's {parent} read-only at the same path (hostPath, type: Directory, mountPropagation: HostToContainer)"
    return RequestError(Code.UNREADABLE, f"cannot read {path} here, where it is ready on the node: {why}", hint=hint)


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _tell(label: str, done: Prefetched) -> None:
    said = f"{label}: read {output.size(done.read)} into the page cache" + (f" at {output.rate(done.rate)}" if done.read else "")
    if done.already_cached:
        said += f", {output.size(done.already_cached)} were there already"
    if done.left_out:
        said += f", {output.size(done.left_out)} left out"
    output.say(said if done.cached is None else f"{said}; {output.size(done.cached)} of {output.size(done.bytes)} are there now")
    for note in done.notes:
        output.say(f"note: {label}: {note}")
