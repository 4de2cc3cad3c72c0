"""What a real QEMU saves is read, put together again byte for byte, and loads from a flat RAM file."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import BinaryIO

import pytest

from imagefs.errors import UnsupportedInputError
from imagefs.formats import open_capture
from imagefs.image.capture import Capture
from tests.vm.machines import (
    MEMORY,
    check_load,
    check_native,
    content,
    firmware,
    running,
    same_memory,
    split_and_mounted,
)


@pytest.mark.parametrize(("machine", "own_file"), [("pc", True), ("q35", True), ("q35", False)])
def test_saved_and_loaded(machine: str, own_file: bool, tmp_path: Path, imagefs: list[str]) -> None:
    """Plain, zlib-compressed and x-ignore-shared saves of one guest: alike but for how they were saved."""
    file = tmp_path / "ram" if own_file else None
    with firmware(tmp_path / "source", machine, file) as vm:
        saves: dict[str, Path] = {}
        flats: dict[str, bytes] = {}
        for kind in ("plain", "zlib", "shared") if file is not None else ("plain", "zlib"):
            capabilities: dict[str, bool] = {"zlib": {"compress": True}, "shared": {"x_ignore_shared": True}}.get(
                kind, {}
            )
            save = vm.migrate_again if saves else vm.migrate
            saves[kind] = save(kind, "exec:cat > ", **capabilities)
            # Between two saves the guest runs for an instant, and SeaBIOS counts ticks.
            flats[kind] = vm.memory() if file is None else file.read_bytes()
    if file is not None:
        file.write_bytes(flats["shared"])
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
            same_memory(flats[kind], content(capture.memory))
            states[kind] = content(capture.state)
            check_load(tmp_path / kind, machine, capture)
            if kind != "shared":
                check_pipe(path, tmp_path, capture)
        with split_and_mounted(path, tmp_path / f"mounted-{kind}", imagefs, *memory_files) as mountpoint:
            same_memory(flats[kind], (mountpoint / "memory").read_bytes())
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
