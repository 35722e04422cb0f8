"""Containers in the guest, as a kubelet and its runtime would make them of a rendered pod: mounts, propagation, users. It runs no image of ours.

Each container has a mount namespace and a root of its own, with the guest's programs in it read-only; host, PIDs and network are the guest's. Mounts
follow what the CRI does: a volume is bound recursively and made rshared (Bidirectional), rslave (HostToContainer) or rprivate.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.node.guest import Guest, Inside
from tests.node.job import Job

PROPAGATION = {None: "rprivate", "None": "rprivate", "HostToContainer": "rslave", "Bidirectional": "rshared"}
PODS = "/run/pods"
AS_SYSTEMD = f"mount --make-rshared / && mkdir -p {PODS}"  # what every node's init does; pods' own volumes and roots live on /run, as containerd's do
# As runc does it: the mounts of the host stay peers only if the container may mount for it; the one that holds the new root is made private first.
_SANDBOX = """
set -e
mount --make-{host} /
mount --make-private /run
mkdir -p {root}
mount -t tmpfs -o mode=755 image {root}
cd {root}
mkdir -p proc sys dev run tmp root var/lib old
cp -a /bin /sbin /lib /lib64 /etc .
for name in usr $(cd /; echo mnt/*); do mkdir -p $name; mount --bind -o ro /$name $name; done
mount --rbind /proc proc; mount --rbind /sys sys
for name in null zero urandom; do touch dev/$name; mount --bind /dev/$name dev/$name; done
{mounts}
pivot_root . old
mount --make-rslave /old
umount -l /old
cd /
echo ready
exec sleep infinity
"""


@dataclass
class Pod:
    """A pod of the rendered objects on the guest as its node. `objects` are those of the same rendering: ConfigMaps are looked up there."""

    guest: Guest
    name: str
    template: dict[str, Any]
    objects: Sequence[dict[str, Any]]
    _sources: dict[str, str] = field(default_factory=dict)

    def container(self, name: str, **environment: str) -> Container:
        """A new container of that name, with nothing running in it; `environment` is added to what the manifest gives it."""
        spec = self.template["spec"]
        (found,) = [one for one in (*spec.get("initContainers", ()), *spec["containers"]) if one["name"] == name]
        if not self._sources:
            self._sources = {volume["name"]: self._volume(volume) for volume in spec.get("volumes", ())}
        return Container(self, found, environment)

    def source(self, volume: str) -> str:
        """The directory in the guest that a volume stands for."""
        return self._sources[volume]

    def _volume(self, volume: dict[str, Any]) -> str:
        """Have it as the kubelet would: host paths by their type, the rest below `PODS`."""
        match volume:
            case {"hostPath": {"path": str(path), "type": "Directory"}}:
                self.guest.run(f"test -d {path}").check()
            case {"hostPath": {"path": str(path)}}:
                self.guest.run(f"umask 022; [ -e {path} ] || mkdir -p {path}").check()
            case _:
                path = f"{PODS}/{self.name}/{volume['name']}"
                self.guest.run(f"mkdir -p -m 777 {path}").check()
                if "configMap" in volume:
                    self._write(path, volume["configMap"]["name"])
        return path

    def _write(self, path: str, name: str) -> None:
        (data,) = [one["data"] for one in self.objects if (one["kind"], one["metadata"]["name"]) == ("ConfigMap", name)]
        for file, text in data.items():
            self.guest.run(f"printf %s {shlex.quote(text)} > {path}/{file}").check()


class Container:
    """One container: made, and there until `kill`. Its processes are those that are started in it."""

    def __init__(self, pod: Pod, spec: dict[str, Any], environment: dict[str, str]) -> None:
        self.pod, self.spec = pod, spec
        context = pod.template["spec"].get("securityContext", {}) | spec.get("securityContext", {})
        self._caps = None if context.get("privileged") else context.get("capabilities", {}).get("add", [])
        self._environment = {one["name"]: one.get("value", "node") for one in spec.get("env", ())} | environment
        script = _SANDBOX.format(
            host="rshared" if self._may_mount else "rslave",
            root=f"{PODS}/{pod.name}/{spec['name']}",
            mounts="\n".join(self._mounts(read_only=context.get("readOnlyRootFilesystem", False))),
        )
        self._holder = pod.guest.start(f"exec unshare --mount --propagation unchanged bash -c {shlex.quote(script)}")
        pod.guest.wait_for(lambda: "ready" in self._holder.so_far().out or self._holder.status is not None, 30, "a container is not made")
        assert self._holder.status is None, self._holder.so_far()
        self._pid = self._holder.pid
        uid = context.get("runAsUser", 0)
        self._inside = Inside(self._pid, uid, context.get("runAsGroup", uid), tuple(context.get("supplementalGroups", ())))

    def start(self) -> Job:
        """Start what the manifest says; `nvcache` is the image's entry point."""
        command = [*self.spec.get("command", ["nvcache"]), *self.spec.get("args", ())]
        return self.nvcache(*command[1:]) if command[0] == "nvcache" else self._start(shlex.join(command))

    def nvcache(self, *arguments: str) -> Job:
        """Start `nvcache ARGUMENTS…` in it, as its user."""
        return self.pod.guest.nvcache(*arguments, inside=self._inside, **self._environment)

    def probe(self, kind: str) -> Job:
        """Start the command of a probe."""
        command = self.spec[kind]["exec"]["command"]
        assert command[0] == "nvcache", command
        return self.nvcache(*command[1:])

    def look(self, command: str) -> str:
        """What a command says in it, run as its user."""
        return self._start(command).wait().check()

    def mounts(self, point: str) -> int:
        """How many layers are mounted at `point`, as seen from in it."""
        return self.pod.guest.run(f"cut -d' ' -f5 /proc/{self._pid}/mountinfo").check().split("\n").count(point)

    def kill(self) -> None:
        """End the container; whatever runs in it keeps its mounts until it is ended too."""
        self._holder.signal("KILL")

    @property
    def _may_mount(self) -> bool:
        return any(one.get("mountPropagation") == "Bidirectional" for one in self.spec.get("volumeMounts", ()))

    def _start(self, command: str) -> Job:
        who = self._inside
        groups = ",".join(map(str, who.groups))
        capabilities = "" if self._caps is None else "--bounding-set=" + ",".join(["-all", *(f"+{name.lower()}" for name in self._caps)])
        user = f"--reuid {who.uid} --regid {who.gid} {f'--groups {groups}' if groups else '--clear-groups'} {capabilities} --no-new-privs"
        variables = " ".join(shlex.quote(f"{name}={value}") for name, value in self._environment.items())
        return self.pod.guest.start(f"exec env {variables} nsenter --mount --target {who.pid} setpriv {user} bash -c {shlex.quote(command)}")

    def _mounts(self, *, read_only: bool) -> Iterator[str]:
        """Shell that binds the volumes; what is read-only becomes so at last, when the mount points below it are there."""
        mounts = self.spec.get("volumeMounts", ())
        for mount in mounts:
            source, target = self.pod.source(mount["name"]), mount["mountPath"].lstrip("/")
            yield f"mkdir -p {target}; mount --rbind {source} {target}; mount --make-{PROPAGATION[mount.get('mountPropagation')]} {target}"
        for mount in mounts:
            if mount.get("readOnly"):
                yield f"mount -o remount,bind,ro {mount['mountPath'].lstrip('/')}"
        if read_only:
            yield "mount -o remount,ro ."
