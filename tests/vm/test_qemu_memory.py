"""Migration streams of real QEMUs, old and new: NUMA nodes, memory modules, XBZRLE, mapped-ram."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from support.qemu_versions import backports_qemu, qemu_programs

from imagefs.formats import open_capture
from imagefs.image.capture import Capture
from tests.vm.machines import (
    MEMORY,
    Machine,
    check_load,
    check_native,
    content,
    firmware,
    running,
    same_memory,
    split_and_mounted,
)

MIB = 1 << 20


@pytest.fixture(params=["installed", "backports"])
def qemu(request: pytest.FixtureRequest) -> str:
    return qemu_programs()[str(request.param)]


def check_memory(vm: Machine, capture: Capture) -> None:
    """All of guest memory is where the guest has it."""
    for region in capture.geometry.regions:
        found = bytes(capture.memory.read_at(region.offset, region.size))
        flat = vm.memory(region.guest_address, region.size)
        if region.guest_address:
            assert found == flat, region
        else:
            same_memory(found, flat)


def test_backend_whose_name_says_nothing(qemu: str, tmp_path: Path) -> None:
    """It is a module, since the firmware was told of less RAM."""
    options = ["-object", "memory-backend-ram,id=more,size=128M", "-device", "pc-dimm,id=module,memdev=more"]
    options += ["-object", "memory-backend-ram,id=some,size=96M", "-machine", "memory-backend=some"]
    with (
        firmware(tmp_path / "source", "pc", None, *options, qemu=qemu, memory=96 * MIB) as vm,
        open_capture(vm.migrate("save"), spool_dir=tmp_path) as capture,
    ):
        check_memory(vm, capture)
        assert capture.restore["ram_blocks"] == {"some": 96 * MIB}
        assert capture.restore["plugged_blocks"] == {"more": 128 * MIB}


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_numa_nodes_and_a_module(machine: str, qemu: str, tmp_path: Path) -> None:
    """The second node is the larger one, so it comes first in the stream."""
    options = []
    for number, size in enumerate((32, 96)):
        options += ["-object", f"memory-backend-ram,id=node{number},size={size}M"]
        options += ["-numa", f"node,nodeid={number},memdev=node{number}"]
    options += ["-object", "memory-backend-ram,id=dimm0,size=128M", "-device", "pc-dimm,id=module,memdev=dimm0"]
    with firmware(tmp_path / "source", machine, None, *options, qemu=qemu, memory=128 * MIB) as vm:
        (module,) = vm.qmp.execute("query-memory-devices")
        path = vm.migrate("save")
        with open_capture(path, spool_dir=tmp_path) as capture:
            check_native(capture, path)
            check_memory(vm, capture)
            assert {region.name: (region.guest_address, region.size) for region in capture.geometry.regions} == {
                "node0": (0, 32 * MIB),
                "node1": (32 * MIB, 96 * MIB),
                "dimm0": (module["data"]["addr"], 128 * MIB),
            }
            assert [region.name for region in capture.geometry.regions] == ["dimm0", "node1", "node0"]
            assert capture.restore["ram_bytes"] == 128 * MIB
            top = capture.memory.read_at(128 * MIB, 96 * MIB)
            assert any(bytes(top)), "SeaBIOS left nothing at the end of the second node's memory"


def test_xbzrle(qemu: str, tmp_path: Path) -> None:
    """Saved while SeaBIOS runs, pages that were sent before as deltas."""
    path = tmp_path / "save"
    # Whether it writes to a page between two passes is up to the machine's load: it is started until it does.
    for attempt in range(20):
        directory = tmp_path / f"source{attempt}"
        directory.mkdir()
        with running(directory, "-machine", "pc", qemu=qemu) as vm:
            vm.set_capabilities({"xbzrle": True})
            vm.qmp.execute("migrate-set-parameters", {"max-bandwidth": MIB, "downtime-limit": 20})
            vm.qmp.execute("migrate", {"uri": f"exec:cat > {path}"})
            assert vm.migrated() == "completed"
            with open_capture(path, spool_dir=tmp_path) as capture:
                check_native(capture, path)
                check_memory(vm, capture)
            if vm.qmp.execute("query-migrate")["xbzrle-cache"]["pages"] > 0:
                return
    pytest.fail("no page was sent as a delta")


@pytest.mark.parametrize("multifd", [False, True])
def test_mapped_ram(multifd: bool, imagefs: list[str], tmp_path: Path) -> None:
    qemu = str(backports_qemu())
    with firmware(tmp_path / "source", "q35", None, qemu=qemu) as vm:
        path = vm.migrate("save", "file:", mapped_ram=True, multifd=multifd)
        flat = vm.memory()
        plain = vm.migrate_again("plain")
    with open_capture(path, spool_dir=tmp_path) as capture:
        check_native(capture, path)
        same_memory(flat, content(capture.memory))
        check_load(tmp_path / "loaded", "q35", capture, qemu)
        with open_capture(plain, spool_dir=tmp_path) as other:
            assert sections_before_devices(capture) == sections_before_devices(other)
        with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as cat:
            assert isinstance(cat.stdout, io.BufferedReader)
            with open_capture(cat.stdout, spool_dir=tmp_path) as piped:
                assert content(piped.memory) == content(capture.memory)
                assert content(piped.state) == content(capture.state)
    with split_and_mounted(path, tmp_path / "mounted", imagefs) as mountpoint:
        same_memory(flat, (mountpoint / "memory").read_bytes())


def sections_before_devices(capture: Capture) -> int:
    """Bytes of the state up to the first device: blocks and their pages."""
    return content(capture.state).index(b"\5timer")


def test_live_mapped_ram(tmp_path: Path) -> None:
    """Of a running guest: pages that became zero lose their bit and keep their bytes."""
    directory = tmp_path / "source"
    directory.mkdir()
    path = tmp_path / "save"
    with running(directory, "-machine", "pc", qemu=str(backports_qemu())) as vm:
        vm.set_capabilities({"mapped-ram": True})
        vm.qmp.execute("migrate-set-parameters", {"max-bandwidth": MIB, "downtime-limit": 20})
        vm.qmp.execute("migrate", {"uri": f"file:{path}"})
        assert vm.migrated() == "completed"
        with open_capture(path, spool_dir=tmp_path) as capture:
            check_native(capture, path)
            check_memory(vm, capture)
            assert capture.memory.size == MEMORY
