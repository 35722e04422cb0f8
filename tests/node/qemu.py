"""One QEMU process: how it is started, spoken to (QMP) and ended. It knows no guest command and no scenario.

QEMU is killed by the kernel when this process dies, whatever way (setpriv --pdeathsig).
"""

from __future__ import annotations

import errno
import json
import re
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# vmlinux starts through PVH and erms is off because TCG is slow at unpacking and at rep movsb.
_CPU = "max,-erms,-smap,-smep,-umip,-pku,-la57"
_KERNEL = "console=ttyS0 loglevel=4 panic=-1 mitigations=off nokaslr tsc=reliable cryptomgr.notests"
OS_DISK_SERIAL = "OSDISK"
_FACTORY_MODEL = b"QEMU NVMe Ctrl"


class Qemu:
    """A stopped machine with `ports` free PCIe ports; `go` lets it run. `folder` holds its control files and becomes its working directory."""

    def __init__(self, folder: Path, image: Path, *, os_disk: str, memory: str, cpus: int, ports: int, shares: Mapping[str, Path]) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        mine, qmp = socket.socketpair()
        self.agent, agent = socket.socketpair()
        argv = _command(image, os_disk=os_disk, memory=memory, cpus=cpus, ports=ports, shares=shares, qmp=qmp.fileno(), agent=agent.fileno())
        with (folder / "qemu.log").open("wb") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[qmp.fileno(), agent.fileno()],
            )
        qmp.close()
        agent.close()
        mine.settimeout(30)
        self._qmp = mine
        self._lines = mine.makefile("rb")
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: object) -> Any:
        """Run one QMP command. Raises RuntimeError with what QEMU says against it, OSError or ValueError when it has gone."""
        with self._lock:
            self._qmp.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
            while True:
                answer = json.loads(self._lines.readline())
                if "error" in answer:
                    raise RuntimeError(f"{name}: {answer['error']['desc']}")
                if "return" in answer:
                    return answer["return"]

    def add_disk(self, address: str, *, serial: str, port: int) -> None:
        """Plug an NVMe disk, served over NBD on the abstract Unix socket `address`, into a port; of the factory's model until `set_models`."""
        if not any(node["node-name"] == f"disk-{serial}" for node in self.command("query-named-block-nodes", flat=True)):
            self.command("blockdev-add", **{"node-name": f"disk-{serial}"}, driver="nbd", server={"type": "unix", "path": address, "abstract": True})
        self.command("device_add", driver="nvme", id=f"nvme-{serial}", drive=f"disk-{serial}", bus=f"port{port}", serial=serial)

    def remove_disk(self, serial: str) -> None:
        """Ask the guest to let go of a disk."""
        self.command("device_del", id=f"nvme-{serial}")

    def has_disk(self, serial: str) -> bool:
        """Whether the guest still has the disk."""
        return any(child["name"] == f"nvme-{serial}" for child in self.command("qom-list", path="/machine/peripheral"))

    def set_models(self, models: Mapping[str, str]) -> None:
        """Give disks their models, by serial. QEMU has no option for it: the identify data of the stopped machine is written to."""
        wanted = {serial.encode().ljust(20) + _FACTORY_MODEL.ljust(40): model.encode()[:40].ljust(40) for serial, model in models.items()}
        with open(f"/proc/{self.process.pid}/mem", "r+b", buffering=0) as memory:
            for low, high in self._mappings():
                memory.seek(low)
                try:
                    content = memory.read(high - low)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    continue  # QEMU, though its guest is stopped, gave this piece back meanwhile; the identify data stays
                for factory in [each for each in wanted if each in content]:
                    memory.seek(low + content.index(factory) + 20)
                    memory.write(wanted.pop(factory))
        if wanted:
            raise RuntimeError(f"no identify data found of {sorted(key[:20].decode().strip() for key in wanted)}")

    def _mappings(self) -> list[tuple[int, int]]:
        """Its writable memory, without the guest's own."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text()
        found = [(int(low, 16), int(high, 16)) for low, high in re.findall(r"(?m)^(\w+)-(\w+) rw-p", maps)]
        return [(low, high) for low, high in found if high - low < 1 << 28]

    def kill(self) -> None:
        """End it as a power cut would; may be repeated."""
        self.process.kill()
        self.process.wait(30)
        self._lines.close()
        self._qmp.close()

    def last_words(self) -> str:
        """The ends of what QEMU and the guest's console said."""
        logs = (self.folder / "qemu.log", self.folder / "console")
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2500:]}" for log in logs if log.exists())


def _command(image: Path, *, os_disk: str, memory: str, cpus: int, ports: int, shares: Mapping[str, Path], qmp: int, agent: int) -> Sequence[str]:
    device = {"virtio": "virtio-blk-pci", "nvme": "nvme"}[os_disk]
    # fmt: off
    argv = [
        "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", _CPU, "-smp", str(cpus), "-m", memory,
        "-bios", "qboot.rom", "-nodefaults", "-display", "none", "-no-reboot", "-S",
        "-serial", "file:console", "-device", "virtio-rng-pci",
        "-chardev", f"socket,id=qmp,fd={qmp}", "-mon", "chardev=qmp,mode=control",
        "-chardev", f"socket,id=agent,fd={agent}", "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=agent",
        "-kernel", str(image / "vmlinux"), "-initrd", str(image / "initrd"), "-append", _KERNEL,
        "-drive", f"if=none,id=os,format=raw,cache=unsafe,snapshot=on,file={image / 'root.img'}",
        "-device", "pcie-root-port,id=port-os,chassis=99,slot=99", "-device", f"{device},drive=os,serial={OS_DISK_SERIAL},bus=port-os",
        "-virtfs", "local,path=share,mount_tag=host,security_model=none",
    ]
    # fmt: on
    for tag, path in shares.items():
        argv += ["-virtfs", f"local,path={path},mount_tag={tag},security_model=none,multidevs=remap,readonly=on"]
    for port in range(ports):
        argv += ["-device", f"pcie-root-port,id=port{port},chassis={port + 1},slot={port + 1}"]
    return argv
