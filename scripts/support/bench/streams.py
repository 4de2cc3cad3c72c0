"""Splitting what QEMU and libvirt write, beside what zstd makes of the same file; and what that takes of memory."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from imagefs.restore.qmp import Qmp
from support.bench.figures import Figure
from support.bench.memory import write_memory
from support.bench.split import LIMIT, measure
from support.qemu_versions import backports_qemu

SIZE = 512 << 20
RUNS = 2
PATIENCE = 120.0
_LIBVIRT_FORMATS = {"raw": 0, "gzip": 1, "zstd": 5}


def run(work: Path) -> Iterator[Figure]:
    write_memory(work / "memory", SIZE)
    stream, mapped = _save(work)
    libvirt = {kind: _libvirt(work, stream, kind) for kind in _LIBVIRT_FORMATS}
    files = {"a migration stream": stream, "a mapped-ram file": mapped, "a libvirt image": libvirt["raw"]}
    files |= {f"a libvirt image, {kind}": path for kind, path in libvirt.items() if kind != "raw"}
    # What is in a compressed image is what is split, so zstd gets that, too.
    unpack = {path: f"{kind} -dc {work}/stream.{kind}" for kind, path in libvirt.items() if kind != "raw"}
    for kind in _LIBVIRT_FORMATS:
        if kind != "raw":
            subprocess.run(f"{kind} -c {stream} >{work}/stream.{kind}", shell=True, check=True)
    for name, path in files.items():
        conditions = f"{SIZE >> 20} MiB guest, 30 % of it zero; best of {RUNS}"
        yardstick = ["sh", "-c", f"{unpack.get(path, f'cat {path}')} | zstd -3 -T2 -q >{work}/zstd"]
        for piped in (False, True):
            zstd = float("inf")
            seconds, peak = float("inf"), 0
            for number in range(RUNS):
                store = work / f"store-{path.name}-{piped}-{number}"
                zstd = min(zstd, measure(yardstick)[0])
                took, resident = _split(path, store, piped)
                seconds, peak = min(seconds, took), max(peak, resident)
            how = f"{name}, a pipe" if piped else name
            rate = SIZE / 1e6
            yield Figure(f"split {how}", rate / seconds, "MB/s", "zstd -3 -T2", rate / zstd, 0.5, "higher", conditions)
            bound = f"{LIMIT >> 20} MiB"
            yield Figure(f"peak memory, {how}", peak, "bytes", bound, LIMIT, 1.0, "lower", conditions)


def _split(path: Path, store: Path, piped: bool) -> tuple[float, int]:
    command = [sys.executable, "-m", "imagefs.cli", "split", "-q", "-" if piped else str(path), str(store / "vm")]
    if not piped:
        return measure(command)
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as cat:
        return measure(command, cat.stdout)


def _save(work: Path) -> tuple[Path, Path]:
    """A guest that never ran, whose memory is the file ``memory``: as a stream and as a mapped-ram file."""
    stream, mapped = work / "stream", work / "mapped"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{work}/qmp")
        listener.listen()
        listener.settimeout(PATIENCE)
        command = [str(backports_qemu()), "-accel", "tcg", "-S", "-nodefaults", "-display", "none"]
        command += ["-machine", "pc,memory-backend=ram", "-m", f"{SIZE >> 20}M"]
        command += ["-object", f"memory-backend-file,id=ram,size={SIZE},mem-path={work}/memory,share=off"]
        command += ["-chardev", f"socket,id=qmp,path={work}/qmp", "-mon", "chardev=qmp,mode=control"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as qemu:
            try:
                with Qmp(listener.accept()[0], "QEMU", PATIENCE) as qmp:
                    _migrate(qmp, f"exec:cat > {stream}", False)
                    _migrate(qmp, f"file:{mapped}", True)
            finally:
                qemu.kill()
    return stream, mapped


def _migrate(qmp: Qmp, uri: str, mapped: bool) -> None:
    states = [{"capability": "mapped-ram", "state": mapped}]
    qmp.execute("migrate-set-capabilities", {"capabilities": states})
    qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
    qmp.execute("migrate", {"uri": uri})
    while (status := qmp.execute("query-migrate")["status"]) not in ("completed", "failed"):
        time.sleep(0.05)
    assert status == "completed", status
    qmp.execute("cont")
    qmp.execute("stop")


def _libvirt(work: Path, stream: Path, kind: str) -> Path:
    path = work / f"libvirt-{kind}"
    data = b"<domain type='qemu'/>\0"
    header = b"LibvirtQemudSave" + struct.pack("<5I", 2, len(data), 1, _LIBVIRT_FORMATS[kind], 0) + bytes(56) + data
    with open(path, "wb") as file:
        file.write(header)
        file.flush()
        command = {"raw": ["cat"], "gzip": ["gzip", "-c"], "zstd": ["zstd", "-c"]}[kind]
        subprocess.run([*command, str(stream)], stdout=file, check=True)
    return path
