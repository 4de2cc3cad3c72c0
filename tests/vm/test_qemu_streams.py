"""What a real QEMU saves is read, put together again byte for byte, and loads from a flat RAM file.

The guest is firmware alone: SeaBIOS looks for something to boot and leaves its traces in memory.
"""

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
from typing import BinaryIO

import pytest

from imagefs.errors import UnsupportedInputError
from imagefs.formats import open_capture
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

    def migrate(self, name: str, **capabilities: bool) -> Path:
        """Stop the guest and save it with these capabilities."""
        path = self.directory / name
        self.qmp.execute("stop")
        self.set_capabilities(capabilities)
        self.qmp.execute("migrate", {"uri": f"exec:cat > {path}"})
        assert self.migrated() == "completed"
        self.set_capabilities(dict.fromkeys(capabilities, False))
        return path

    def migrate_again(self, name: str, **capabilities: bool) -> Path:
        """A guest that was saved must run before it is saved again; here for as short as can be."""
        self.qmp.execute("cont")
        return self.migrate(name, **capabilities)

    def set_capabilities(self, capabilities: Mapping[str, bool]) -> None:
        listed = [{"capability": name.replace("_", "-"), "state": on} for name, on in capabilities.items()]
        self.qmp.execute("migrate-set-capabilities", {"capabilities": listed})

    def migrated(self) -> str:
        def status() -> str:
            return str(self.qmp.execute("query-migrate").get("status"))

        wait_for(lambda: status() in ("completed", "failed"))
        return status()

    def memory(self) -> bytes:
        """Guest-physical memory from zero on, as the stopped guest has it; devices and ROMs where they are."""
        path = self.directory / "pmem"
        self.qmp.execute("pmemsave", {"val": 0, "size": MEMORY, "filename": str(path)})
        return path.read_bytes()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def running(directory: Path, *options: str, ram: Path | None = None) -> Iterator[Machine]:
    directory.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, open(directory / "stderr", "wb") as stderr:
        listener.bind(f"{directory}/qmp")
        listener.listen()
        listener.settimeout(PATIENCE)
        # A session of its own, so that its children (exec:cat) end with it.
        process = subprocess.Popen(
            [
                *(QEMU, "-accel", "tcg", "-m", f"{MEMORY >> 20}M", "-nodefaults", "-display", "none", "-vga", "std"),
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
def firmware(directory: Path, machine: str, ram: Path | None) -> Iterator[Machine]:
    """A machine whose SeaBIOS has found nothing to boot; ``ram`` None: memory of its own, ``pc.ram``."""
    log = directory / "seabios"
    options = ["-chardev", f"file,id=log,path={log}", "-device", "isa-debugcon,iobase=0x402,chardev=log"]
    if ram is None:
        options += ["-machine", machine]
    else:
        options += ["-object", f"memory-backend-file,id=ram,size={MEMORY},mem-path={ram},share=on"]
        options += ["-machine", f"{machine},memory-backend=ram"]
    directory.mkdir()
    with running(directory, *options, ram=ram) as vm:
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


def check_load(directory: Path, machine: str, capture: Capture) -> None:
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
    with running(directory, *options) as vm:
        assert vm.migrated() == "completed"
        wait_for(lambda: vm.qmp.execute("query-status")["status"] != "inmigrate")
        same_memory(vm.memory(), content(capture.memory))
        vm.qmp.execute("cont")
        assert vm.qmp.execute("query-status")["status"] == "running"
    assert (directory / "stderr").read_bytes() == b""


@pytest.mark.parametrize(("machine", "own_file"), [("pc", True), ("q35", True), ("q35", False)])
def test_saved_and_loaded(machine: str, own_file: bool, tmp_path: Path) -> None:
    """Plain, zlib-compressed and x-ignore-shared saves of one guest: alike but for how they were saved."""
    file = tmp_path / "ram" if own_file else None
    with firmware(tmp_path / "source", machine, file) as vm:
        saves = {"plain": vm.migrate("plain"), "zlib": vm.migrate_again("zlib", compress=True)}
        flat = vm.memory()
        if file is not None:
            flat = file.read_bytes()
            saves["shared"] = vm.migrate_again("shared", x_ignore_shared=True)
    block = "ram" if own_file else "pc.ram"
    states = {}
    for kind, path in saves.items():
        memory_files = [file] if file is not None and kind == "shared" else []
        with open_capture(path, spool_dir=tmp_path, memory_files=memory_files) as capture:
            assert capture.restore["machine"].startswith({"pc": "pc-i440fx-", "q35": "pc-q35-"}[machine])
            assert capture.restore["ram_block"] == block
            assert capture.restore["cpus"] == 1
            assert capture.memory.size == MEMORY
            check_native(capture, path)
            same_memory(flat, content(capture.memory))
            states[kind] = content(capture.state)
            check_load(tmp_path / kind, machine, capture)
            if kind != "shared":
                check_pipe(path, tmp_path, capture)
    # Alike up to the first device, which keeps the time; QEMU's threads that compress change the order of pages.
    ram = {kind: state[: state.index(b"\5timer")] for kind, state in states.items()}
    assert len(ram["zlib"]) == len(ram["plain"])
    assert ram.get("shared", ram["plain"]) == ram["plain"]
    if own_file:
        with (
            pytest.raises(UnsupportedInputError, match="--memory"),
            open_capture(saves["shared"], spool_dir=tmp_path),
        ):
            pass


def check_pipe(path: Path, spool_dir: Path, expected: Capture) -> None:
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        stream: BinaryIO = cat.stdout  # type: ignore[assignment]
        with open_capture(stream, spool_dir=spool_dir) as capture:
            check_native(capture, path)
            assert content(capture.memory) == content(expected.memory)
            assert content(capture.state) == content(expected.state)


def test_live_migrated(tmp_path: Path) -> None:
    """Saved while SeaBIOS runs, so slowly that it writes to pages that were saved already."""
    directory = tmp_path / "source"
    directory.mkdir()
    path = tmp_path / "save"
    with running(directory, "-machine", "pc") as vm:
        vm.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20, "downtime-limit": 50})
        vm.qmp.execute("migrate", {"uri": f"exec:cat > {path}"})
        assert vm.migrated() == "completed"
        flat = vm.memory()
    with open_capture(path, spool_dir=tmp_path) as capture:
        check_native(capture, path)
        same_memory(flat, content(capture.memory))
        check_pipe(path, tmp_path, capture)
