"""What a mountpoint says about its guest, and what is no mountpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imagefs.errors import ImagefsError, MountError, RestoreError
from imagefs.restore.mountpoint import read_mountpoint

RESTORE = {"vmm": "qemu", "machine": "pc-i440fx-7.2", "ram_block": "pc.ram", "ram_bytes": 8192, "cpus": 2}


def mountpoint(directory: Path, document: Any, memory: int | None = 8192) -> Path:
    (directory / "metadata.json").write_text(document if isinstance(document, str) else json.dumps(document))
    (directory / "state").write_bytes(b"state")
    if memory is not None:
        (directory / "memory").write_bytes(bytes(memory))
    return directory


def test_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mountpoint(tmp_path, {"restore": RESTORE, "source": {"format": "qemu-migration"}})
    monkeypatch.chdir(tmp_path)
    image = read_mountpoint(Path("."))
    assert (image.machine, image.ram_block, image.ram_bytes, image.cpus) == ("pc-i440fx-7.2", "pc.ram", 8192, 2)
    assert (image.mountpoint, image.memory, image.state) == (tmp_path, tmp_path / "memory", tmp_path / "state")


def test_number_of_cpus_need_not_be_known(tmp_path: Path) -> None:
    mountpoint(tmp_path, {"restore": {k: v for k, v in RESTORE.items() if k != "cpus"}})
    assert read_mountpoint(tmp_path).cpus is None


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="nowhere: no such directory"):
        read_mountpoint(tmp_path / "nowhere")


def test_nothing_is_mounted(tmp_path: Path) -> None:
    with pytest.raises(MountError, match=rf"no imagefs is mounted there .* mount\.imagefs STORE/NAME {tmp_path}"):
        read_mountpoint(tmp_path)


@pytest.mark.parametrize(
    ("document", "error", "says"),
    [
        ("{", MountError, "no JSON object"),
        ([], MountError, "no JSON object"),
        ({}, MountError, "no 'restore'"),
        ({"restore": {}, "source": {"format": "raw"}}, RestoreError, r"\(from the format raw\) holds memory only"),
        ({"restore": {}}, RestoreError, "can be inspected, not resumed"),
        ({"restore": RESTORE | {"vmm": "new\n"}}, RestoreError, r"VMM 'new\\n', which nothing here can resume"),
        ({"restore": {"vmm": ["qemu"]}}, RestoreError, r"VMM \['qemu'\]"),
        ({"restore": {"vmm": "xen"}}, RestoreError, r"not of QEMU: .* xl restore /.*/native"),
        ({"restore": {"vmm": "firecracker"}}, RestoreError, r"snapshot_path /.*/state, .* /.*/memory"),
        ({"restore": {"vmm": "cloud-hypervisor"}}, RestoreError, r"--restore source_url=file:///.*/native"),
        ({"restore": {"vmm": "criu"}}, RestoreError, r"criu restore -D /.*/native \(which is untried\)"),
        ({"restore": {"vmm": "vmware"}}, RestoreError, "can be inspected, not resumed"),
        (
            {"restore": RESTORE | {"ram_blocks": {"a": 1}, "plugged_blocks": {"b": 2}}},
            RestoreError,
            r"\(a, b\).*/native",
        ),
        ({"restore": RESTORE | {"machine": None}}, MountError, r"restore\.machine is None"),
        ({"restore": RESTORE | {"ram_bytes": "8192"}}, MountError, r"restore\.ram_bytes is '8192'"),
        ({"restore": RESTORE | {"ram_bytes": 0}}, MountError, r"restore\.ram_bytes is 0"),
        ({"restore": RESTORE | {"ram_bytes": 4096}}, MountError, "has 8,192 bytes, the guest's RAM 4,096"),
    ],
)
def test_what_cannot_be_restored(tmp_path: Path, document: Any, error: type[ImagefsError], says: str) -> None:
    with pytest.raises(error, match=says):
        read_mountpoint(mountpoint(tmp_path, document))


def test_mount_that_lacks_its_memory(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="memory: No such file"):
        read_mountpoint(mountpoint(tmp_path, {"restore": RESTORE}, memory=None))
