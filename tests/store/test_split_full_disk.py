"""A split onto a disk that is too small, by whatever amount: it says so, and leaves nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagefs.cli import main
from imagefs.store.directory import DirectoryStore
from tests.unit.captures import memory_of

KIB = 1024
MEMORY = memory_of(300, 81, 0.3)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A directory that can be given a size."""
    path = tmp_path / "disk"
    path.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "imagefs-test", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def used(disk: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in disk.rglob("*") if path.is_file())


def test_every_size(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From nothing at all to just enough: the chunks, the index, the catalogue and the name each find the disk full."""
    (tmp_path / "vm.mem").write_bytes(MEMORY)
    command = ["split", "-q", "--format", "raw", str(tmp_path / "vm.mem")]
    assert main([*command, f"{disk}/whole/vm"]) == 0
    enough = used(disk) + 64 * KIB
    subprocess.run(["rm", "-r", disk / "whole"], check=True)
    store = DirectoryStore(disk / "store", create=True)
    failed = 0
    for size in range(8 * KIB, enough + 64 * KIB, 4 * KIB):
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
        status = main([*command, f"{disk}/store/vm"])
        err = capsys.readouterr().err
        if status == 0:
            assert main(["verify", "-q", f"{disk}/store/vm"]) == 0
            break
        failed += 1
        assert status == 1
        assert "no space left" in err
        assert err.count("\n") == 1
        assert list(store.keys()) == [], size
        assert list((disk / "store").glob(".tmp/*")) == []
    assert status == 0
    assert failed > 100


def test_full_beside_another_image(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The image that is there stays as it is, and so does its name."""
    target = f"{disk}/store/vm"
    (tmp_path / "vm.mem").write_bytes(MEMORY)
    assert main(["split", "-q", "--format", "raw", str(tmp_path / "vm.mem"), target]) == 0
    store = DirectoryStore(disk / "store")
    before = {key: store.get(key) for key in store.keys()}  # noqa: SIM118 - a store is no mapping
    (tmp_path / "other.mem").write_bytes(memory_of(300, 82, 0.3))
    for more in range(0, 1024 * KIB, 64 * KIB):
        subprocess.run(["mount", "-o", f"remount,size={used(disk) + 16 * KIB + more}", disk], check=True)
        status = main(["split", "-q", "--format", "raw", str(tmp_path / "other.mem"), target])
        if status == 0:
            break
        assert "no space left" in capsys.readouterr().err
        assert {key: store.get(key) for key in store.keys()} == before  # noqa: SIM118 - a store is no mapping
    assert more > 0
    assert main(["verify", "-q", target]) == 0
