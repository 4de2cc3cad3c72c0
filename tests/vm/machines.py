"""Machines with firmware alone: SeaBIOS looks for something to boot and leaves its traces in memory."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from support.mounts import mounted

from imagefs.image.capture import ByteSource, Capture
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native_reader import NativeReader
from imagefs.restore.qmp import Qmp

QEMU = "qemu-system-x86_64"
PATIENCE = 60.0
MEMORY = 32 << 20


@dataclass
class Machine:
    """A running QEMU. ``ram`` is the file behind its memory, if it is in a shared one."""

    qmp: Qmp
    directory: Path
    ram: Path | None

    def migrate(self, name: str, uri: str = "exec:cat > ", **capabilities: bool) -> Path:
        """Stop the guest and save it with these capabilities."""
        path = self.directory / name
        self.qmp.execute("stop")
        self.set_capabilities(capabilities)
        self.qmp.execute("migrate", {"uri": f"{uri}{path}"})
        assert self.migrated() == "completed"
        self.set_capabilities(dict.fromkeys(capabilities, False))
        return path

    def migrate_again(self, name: str, uri: str = "exec:cat > ", **capabilities: bool) -> Path:
        """A guest that was saved must run before it is saved again; here for as short as can be."""
        self.qmp.execute("cont")
        return self.migrate(name, uri, **capabilities)

    def set_capabilities(self, capabilities: Mapping[str, bool]) -> None:
        listed = [{"capability": name.replace("_", "-"), "state": on} for name, on in capabilities.items()]
        self.qmp.execute("migrate-set-capabilities", {"capabilities": listed})

    def migrated(self) -> str:
        def status() -> str:
            return str(self.qmp.execute("query-migrate").get("status"))

        wait_for(lambda: status() in ("completed", "failed"))
        return status()

    def memory(self, address: int = 0, size: int = MEMORY) -> bytes:
        """Guest-physical memory as the stopped guest has it; devices and ROMs where they are."""
        path = self.directory / "pmem"
        self.qmp.execute("pmemsave", {"val": address, "size": size, "filename": str(path)})
        return path.read_bytes()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def running(
    directory: Path, *options: str, ram: Path | None = None, qemu: str = QEMU, memory: int = MEMORY
) -> Iterator[Machine]:
    directory.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, open(directory / "stderr", "wb") as stderr:
        listener.bind(f"{directory}/qmp")
        listener.listen()
        listener.settimeout(PATIENCE)
        # A session of its own, so that its children (exec:cat) end with it.
        process = subprocess.Popen(
            [
                *(
                    qemu,
                    "-accel",
                    "tcg",
                    "-m",
                    f"{memory >> 20}M,slots=2,maxmem=1G",
                    "-nodefaults",
                    "-display",
                    "none",
                    "-vga",
                    "std",
                ),
                *("-chardev", f"socket,id=qmp,path={directory}/qmp", "-mon", "chardev=qmp,mode=control"),
                *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            with Qmp(listener.accept()[0], "QEMU under test", PATIENCE) as qmp:
                yield Machine(qmp, directory, ram)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def firmware(
    directory: Path, machine: str, ram: Path | None, *more: str, qemu: str = QEMU, memory: int = MEMORY
) -> Iterator[Machine]:
    """A machine whose SeaBIOS has found nothing to boot; ``ram`` None: memory of its own, ``pc.ram``."""
    log = directory / "seabios"
    options = ["-chardev", f"file,id=log,path={log}", "-device", "isa-debugcon,iobase=0x402,chardev=log", *more]
    if ram is None:
        options += ["-machine", machine]
    else:
        options += ["-object", f"memory-backend-file,id=ram,size={MEMORY},mem-path={ram},share=on"]
        options += ["-machine", f"{machine},memory-backend=ram"]
    directory.mkdir()
    with running(directory, *options, ram=ram, qemu=qemu, memory=memory) as vm:
        wait_for(lambda: log.exists() and b"No bootable device" in log.read_bytes())
        yield vm


def content(source: ByteSource) -> bytes:
    return bytes(source.read_at(0, source.size))


def same_memory(found: bytes, flat: bytes) -> None:
    """Equal but for where devices and ROMs lie over RAM."""
    assert len(found) == len(flat)
    differ = [at for at in range(0, len(flat), PAGE_SIZE) if found[at : at + PAGE_SIZE] != flat[at : at + PAGE_SIZE]]
    assert [hex(at) for at in differ if not 0xA0000 <= at < 0x100000] == []
    assert any(flat)


def check_native(capture: Capture, path: Path) -> None:
    reader = NativeReader(capture.native, capture.memory)
    assert content(reader) == path.read_bytes()


@contextlib.contextmanager
def split_and_mounted(path: Path, directory: Path, imagefs: list[str], *memory: Path) -> Iterator[Path]:
    """The mountpoint of the file's image, once ``native`` was found to be that file."""
    directory.mkdir()
    options = [word for each in memory for word in ("--memory", str(each))]
    command = [*imagefs, "split", "-q", *options, str(path), str(directory / "store" / "vm")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with mounted(f"{directory}/store/vm", directory / "mnt", "nocache") as mountpoint:
        subprocess.run(["cmp", str(path), str(mountpoint / "native")], check=True)
        yield mountpoint


def check_load(directory: Path, machine: str, capture: Capture, qemu: str = QEMU) -> None:
    """A stock QEMU takes the state, with RAM from the flat file, and runs."""
    directory.mkdir()
    state, flat = directory / "state", directory / "memory"
    state.write_bytes(content(capture.state))
    flat.write_bytes(content(capture.memory))
    block = capture.restore["ram_block"]
    options = ["-object", f"memory-backend-file,id={block},size={MEMORY},mem-path={flat},share=off"]
    options += ["-machine", f"{machine},memory-backend={block}", "-S", "-incoming", f"exec:cat {state}"]
    # The log of SeaBIOS is a device like any other.
    options += ["-chardev", "null,id=log", "-device", "isa-debugcon,iobase=0x402,chardev=log"]
    with running(directory, *options, qemu=qemu) as vm:
        assert vm.migrated() == "completed"
        wait_for(lambda: vm.qmp.execute("query-status")["status"] != "inmigrate")
        same_memory(vm.memory(), content(capture.memory))
        vm.qmp.execute("cont")
        assert vm.qmp.execute("query-status")["status"] == "running"
    assert (directory / "stderr").read_bytes() == b""
