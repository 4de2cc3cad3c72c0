"""Other programs that show a remote file as a local one, each in the form that was found best; QEMU maps that file.

All are read-only, and QEMU 7.2 opens its RAM file for writing although ``share=off`` never writes to it. A preloaded
function (``readonly.c``) lets it open the file for reading. The device state, 100 KB, comes by ``curl``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.commands import run
from support.mounts import MountFailedError, unmount
from support.resume.ways import Place, Start

SHIM = Path(__file__).with_name("readonly.c")
SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Mapped:
    """QEMU maps ``memory`` below a mountpoint that ``command`` has made; without one, the flat file itself."""

    name: str
    label: str
    command: Callable[[Place, Path], Sequence[str]] | None
    """Mounts at the path that it is given, stays in the foreground, and ends when that is unmounted."""
    forms: tuple[str, ...] = ("flat",)
    remote: bool = True
    local: bool = False

    def suits(self, remote: bool) -> bool:
        return self.remote if remote else self.local

    @contextmanager
    def open(self, place: Place) -> Iterator[Start]:
        state = shlex.quote(place.at("flat/state.zst"))
        incoming = f"exec:curl -sSf {state} | zstd -dc" if place.url else f"exec:zstd -dc {state}"
        with self._memory(place) as memory, tempfile.TemporaryDirectory(prefix="imagefs-shim-") as shim:
            library = Path(shim) / "readonly.so"
            run("gcc", "-std=c11", "-O2", "-shared", "-fPIC", "-o", str(library), str(SHIM))
            size = f"{place.site.memory_mib}M"
            backend = f"memory-backend-file,id=pc.ram,size={size},mem-path={memory},share=off"
            yield Start(
                extra=["-object", backend, "-machine", "pc,memory-backend=pc.ram", "-incoming", incoming],
                environment={"LD_PRELOAD": str(library), "READONLY_FILE": str(memory)},
            )

    @contextmanager
    def _memory(self, place: Place) -> Iterator[Path]:
        if self.command is None:
            yield place.site.root / "flat" / "memory"
            return
        mountpoint = place.work / "mnt"
        mountpoint.mkdir()
        with open(place.work / "log", "wb") as log:
            process = subprocess.Popen(
                self.command(place, mountpoint),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            while not os.path.ismount(mountpoint):
                if process.poll() is not None:
                    raise MountFailedError(f"{self.name}: {(place.work / 'log').read_text(errors='replace')[-400:]}")
                if time.monotonic() > place.deadline:
                    raise TimeoutError
                time.sleep(0.005)
            yield mountpoint / "memory"
        finally:
            unmount(mountpoint)
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """It ends by itself after unmounting, or it is made to."""
    for how in (None, process.terminate, process.kill):
        if how is not None:
            how()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
            return


def _nbdkit(place: Place, mountpoint: Path) -> list[str]:
    show = f'exec nbdfuse -r {shlex.quote(str(mountpoint / "memory"))} "$uri"'
    return ["nbdkit", "-f", "-U", "-", "curl", f"url={place.at('flat/memory')}", "--run", show]


def _rclone(place: Place, mountpoint: Path) -> list[str]:
    # With its defaults it reads on at each new place, and throws that away at the next: 2.2 GB and 25 s to the first
    # GET over 1 Gbit/s and 10 ms. So: 0.2 GB, 3.4 s.
    tuned = ["--vfs-cache-mode", "full", "--vfs-read-chunk-size", "128k", "--buffer-size", "0"]
    own = ["--config", "/dev/null", "--cache-dir", str(place.work / "rclone"), "--read-only"]
    return ["rclone", "mount", ":http:", str(mountpoint), "--http-url", f"{place.at('flat')}/", *own, *tuned]


def _casync(place: Place, mountpoint: Path) -> list[str]:
    return [
        "casync",
        "mount",
        f"--store={place.at('casync/chunks.castr')}",
        place.at("casync/memory.caidx"),
        str(mountpoint),
    ]


PEERS = (
    Mapped("nbdkit", "nbdkit curl + nbdfuse", _nbdkit),
    Mapped("rclone", "rclone mount", _rclone),
    Mapped("casync", "casync mount", _casync, forms=("flat", "casync"), local=True),
)

FLAT = Mapped("flat", "flat file, mapped by QEMU", None, remote=False, local=True)
"""The floor: nothing is between QEMU and the file."""
