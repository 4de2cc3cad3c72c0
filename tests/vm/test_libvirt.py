"""Save images of a real libvirt: split, mounted, the same byte for byte, and restored by libvirt from the mount."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.guest import Guest
from support.libvirt import Libvirt, SerialLine
from support.link import Link
from support.mounts import mounted
from support.nginx import Nginx
from support.qemu_versions import backports_qemu

from imagefs.formats import open_capture
from tests.vm.conftest import FILL_MIB
from tests.vm.machines import check_native, content, firmware, same_memory
from tests.vm.restoring import MEMORY_MIB

# libvirt asks each QEMU for all that it can do before it first starts one.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def libvirt() -> Iterator[Libvirt]:
    with Libvirt() as running:
        yield running


def split(imagefs: list[str], save: Path, target: Path) -> None:
    done = subprocess.run([*imagefs, "split", "-q", str(save), str(target)], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_restored_while_its_pages_arrive(libvirt: Libvirt, guest: Guest, imagefs: list[str], tmp_path: Path) -> None:
    save = tmp_path / "vm.save"
    socket = libvirt.directory / "serial"
    mountpoint = tmp_path / "mnt"
    with SerialLine(socket) as serial:
        libvirt.create("vm", MEMORY_MIB, "q35", guest, socket)
        serial.accept()
        serial.expect("FILLED")
        nonce, count = serial.ping()
        libvirt.virsh("save", "vm", str(save))
        split(imagefs, save, tmp_path / "store" / "vm")
        save_bytes = save.stat().st_size
        with (
            Nginx(tmp_path / "store") as nginx,
            Link(nginx.address, mbit=60.0, rtt_ms=5.0) as link,
            mounted(f"{link.url}/vm", mountpoint, f"cache={tmp_path}/cache"),
        ):
            libvirt.restart()
            assert not complete(mountpoint), "the link was not slow enough to show anything"
            libvirt.virsh("restore", str(mountpoint / "native"))
            serial.accept()
            found, goes_on = serial.ping()
            assert found == nonce
            assert count <= goes_on < count + 600
            assert serial.ask("check") == f"ok pages={FILL_MIB << 8} writes=0 nonce={nonce}"
            libvirt.virsh("destroy", "vm")
            assert (mountpoint / "native").stat().st_size == save_bytes
            assert b"<name>vm</name>" in (mountpoint / "config" / "domain.xml").read_bytes()
            subprocess.run(["cmp", str(save), str(mountpoint / "native")], check=True)


def complete(mountpoint: Path) -> bool:
    return bool(json.loads((mountpoint / ".imagefs" / "status.json").read_text())["memory"]["complete"])


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "lzop"])
def test_compressed(kind: str, libvirt: Libvirt, imagefs: list[str], tmp_path: Path) -> None:
    libvirt.restart(kind)
    libvirt.create(kind, 32, "pc")
    save = tmp_path / "vm.save"
    libvirt.virsh("save", kind, str(save))
    assert save.stat().st_size < 1 << 20
    with open_capture(save, spool_dir=tmp_path) as capture:
        assert capture.restore["libvirt_format"] == kind
        assert capture.restore["ram_bytes"] == 32 << 20
        assert any(content(capture.memory))
        check_native(capture, save)
    split(imagefs, save, tmp_path / "store" / "vm")
    mountpoint = tmp_path / "mnt"
    with mounted(f"{tmp_path}/store/vm", mountpoint, "nocache"):
        libvirt.restart(kind)
        libvirt.virsh("restore", str(mountpoint / "native"))
        assert libvirt.virsh("domstate", kind).strip() == "running"
        libvirt.virsh("destroy", kind)


def header(kind: int) -> bytes:
    data = b"<domain type='qemu'/>\0".ljust(64 << 10, b"\0")
    return b"LibvirtQemudSave" + struct.pack("<5I", 2, len(data), 1, kind, 0) + bytes(56) + data


def test_zstd(tmp_path: Path) -> None:
    """Newer than Debian's libvirt: a stream of QEMU's, compressed as libvirt would, behind libvirt's header."""
    with firmware(tmp_path / "source", "pc", None) as vm:
        plain = vm.migrate("plain")
        flat = vm.memory()
    packed = subprocess.run(["zstd", "-c", str(plain)], capture_output=True, check=True).stdout
    save = tmp_path / "vm.save"
    save.write_bytes(header(5) + packed)
    with open_capture(save, spool_dir=tmp_path) as capture:
        same_memory(flat, content(capture.memory))
        check_native(capture, save)


def test_sparse(tmp_path: Path) -> None:
    """Newer than Debian's libvirt: QEMU writes mapped-ram behind libvirt's header, with offsets of the whole file."""
    save = tmp_path / "source" / f"vm.save,offset={len(header(6))}"
    with firmware(tmp_path / "source", "pc", None, qemu=str(backports_qemu())) as vm:
        file = tmp_path / "source" / "vm.save"
        file.write_bytes(header(6))
        vm.migrate(save.name, "file:", mapped_ram=True)
        flat = vm.memory()
    with open_capture(file, spool_dir=tmp_path) as capture:
        assert capture.restore["libvirt_format"] == "sparse"
        same_memory(flat, content(capture.memory))
        check_native(capture, file)
