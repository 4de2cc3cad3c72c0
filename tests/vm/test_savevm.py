"""Snapshots that QEMU's ``savevm`` made: split, mounted, the same byte for byte, and loaded by QEMU again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.mounts import mounted
from support.qemu_versions import qemu_programs

from imagefs.formats import open_capture
from tests.vm.machines import Machine, check_load, check_native, content, firmware, running, same_memory


def disk_options(path: Path) -> list[str]:
    return ["-drive", f"file={path},format=qcow2,if=none,id=disk"]


def monitor(vm: Machine, command: str) -> str:
    return str(vm.qmp.execute("human-monitor-command", {"command-line": command}))


@pytest.mark.parametrize("which", ["installed", "backports"])
def test_savevm(which: str, imagefs: list[str], tmp_path: Path) -> None:
    qemu = qemu_programs()[which]
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -q -P 65 1M 3M", str(disk)], check=True)
    flats = {}
    with firmware(tmp_path / "source", "pc", None, *disk_options(disk), qemu=qemu) as vm:
        for name in ("first", "second"):
            vm.qmp.execute("stop")
            assert monitor(vm, f"savevm {name}") == ""
            flats[name] = vm.memory()
            vm.qmp.execute("cont")
    with open_capture(disk, spool_dir=tmp_path, snapshot="second") as capture:
        check_native(capture, disk)
        same_memory(flats["second"], content(capture.memory))
        # Both snapshots' states and the disk are literals but for the pages of this one.
        assert capture.native.literals.size < disk.stat().st_size - 50 * 4096
        check_load(tmp_path / "loaded", "pc", capture, qemu)
    command = [*imagefs, "split", "-q", "--snapshot", "first", str(disk), str(tmp_path / "store" / "vm")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with mounted(f"{tmp_path}/store/vm", tmp_path / "mnt", "nocache"):
        subprocess.run(["cmp", str(disk), str(tmp_path / "mnt" / "native")], check=True)
        memory = (tmp_path / "mnt" / "memory").read_bytes()
        same_memory(flats["first"], memory)
        copy = tmp_path / "copy.qcow2"
        subprocess.run(["cp", str(tmp_path / "mnt" / "native"), str(copy)], check=True)
    log = ["-chardev", "null,id=log", "-device", "isa-debugcon,iobase=0x402,chardev=log"]
    with running(
        tmp_path / "again", "-machine", "pc", *log, *disk_options(copy), "-loadvm", "first", "-S", qemu=qemu
    ) as vm:
        same_memory(flats["first"], vm.memory())
