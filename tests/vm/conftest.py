"""Guests for the tests that run QEMU, and images of guests that were saved."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.guest import Guest, build_guest
from support.link import Link
from support.nginx import Nginx
from support.qemu_versions import backports_qemu
from support.vm import Vm

from imagefs.formats import open_capture
from imagefs.image.capture import ByteSource, Capture
from imagefs.image.geometry import PAGE_SIZE
from imagefs.restore.suspend import suspended
from tests.vm.restoring import EXIT_DEVICE, MEMORY_MIB, SavedVm, Stored, stored

FILL_MIB = 64
PIECE = 1 << 20
SLOW_MBIT, RTT_MS = 40.0, 10.0


@pytest.fixture(scope="session")
def guest() -> Guest:
    """With a pattern of text, random and nearly empty pages."""
    return build_guest(fill_mib=FILL_MIB, kind="mixed", seed=7)


@pytest.fixture(scope="session")
def imagefs() -> list[str]:
    """The command ``imagefs`` of this checkout."""
    return [sys.executable, "-m", "imagefs.cli"]


def save(vm: Vm, directory: Path, guest: Guest, options: dict[str, Any]) -> SavedVm:
    """Suspend a guest whose pattern is there into a directory; the guest stays paused."""
    vm.expect("FILLED")
    nonce, count = vm.ping()
    with (
        suspended(vm.qmp_socket) as source,
        open_capture(source.stream, spool_dir=directory.parent, memory_files=source.memory_files) as capture,
    ):
        show(capture, directory)
    return SavedVm(directory, guest, options, nonce, count)


def show(capture: Capture, directory: Path) -> None:
    """A capture as the files that a restore reads."""
    directory.mkdir()
    write(capture.memory, directory / "memory")
    write(capture.state, directory / "state")
    document = {
        "source": {"format": capture.source_format, "version": capture.source_version},
        "page_size": PAGE_SIZE,
        "regions": [
            {"name": region.name, "guest_address": region.guest_address, "size": region.size, "offset": region.offset}
            for region in capture.geometry.regions
        ],
        "restore": dict(capture.restore),
    }
    (directory / "metadata.json").write_text(json.dumps(document))


def write(source: ByteSource, path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(source.size)
        offset = 0
        while (offset := source.next_data(offset)) < source.size:
            data = source.read_at(offset, PIECE)
            file.seek(offset)
            file.write(data)
            offset += len(data)


@pytest.fixture(scope="session")
def pc(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> SavedVm:
    """One vCPU, i440FX, RAM in a shared file, with a device through which the guest ends QEMU."""
    options: dict[str, Any] = {"memory_mib": MEMORY_MIB, "backend": "file", "extra": EXIT_DEVICE}
    with Vm(guest, **options) as vm:
        saved = save(vm, tmp_path_factory.mktemp("pc") / "image", guest, options)
    return saved


@pytest.fixture(scope="session")
def q35(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> SavedVm:
    """Two vCPUs, Q35, RAM of the machine's own."""
    options: dict[str, Any] = {"memory_mib": MEMORY_MIB, "backend": "default", "machine": "q35", "smp": 2}
    with Vm(guest, **options) as vm:
        saved = save(vm, tmp_path_factory.mktemp("q35") / "image", guest, options)
    return saved


@pytest.fixture(scope="session")
def one(guest: Guest, imagefs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """One vCPU, RAM of the machine's own."""
    return stored(guest, imagefs, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="session")
def two(guest: Guest, imagefs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Two vCPUs, Q35, RAM in a shared memfd."""
    return stored(guest, imagefs, tmp_path_factory.mktemp("two"), machine="q35", smp=2, backend="memfd")


@pytest.fixture(scope="session")
def newer(guest: Guest, imagefs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """One vCPU, Q35, on the QEMU of Debian's backports."""
    return stored(guest, imagefs, tmp_path_factory.mktemp("newer"), machine="q35", qemu=str(backports_qemu()))


@pytest.fixture
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    """A slow one, to the store that the test's fixture ``saved`` is in."""
    saved: Stored = request.getfixturevalue("saved")
    with Nginx(saved.store) as nginx, Link(nginx.address, mbit=SLOW_MBIT, rtt_ms=RTT_MS) as slow:
        yield slow


@pytest.fixture(params=["one", "two", "newer"])
def saved(request: pytest.FixtureRequest) -> Stored:
    found: Stored = request.getfixturevalue(request.param)
    return found
