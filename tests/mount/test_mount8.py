"""``mount -t imagefs`` with a real image, as fstab and systemd call it: the lines that the documentation shows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagefs.mount import kernel
from tests.mount.conftest import ROOT, environment, wait_until

DOCUMENT = ROOT / "docs/mounting.md"
HELPER = Path("/sbin/mount.imagefs")
SOURCE, MOUNTPOINT = "http://store.example/store/vm1", "/mnt/vm1"


@pytest.fixture
def helper() -> Iterator[None]:
    """/sbin/mount.imagefs as it is installed; otherwise one that is taken away again."""
    if os.path.lexists(HELPER):
        yield
        return
    text = f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec {sys.executable} -m imagefs.cli.mount "$@"\n'
    HELPER.write_text(text)
    HELPER.chmod(0o755)
    try:
        yield
    finally:
        HELPER.unlink()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """STORE/NAME of an image of 2 MiB of raw memory, ``tmp_path/raw``."""
    (tmp_path / "raw").write_bytes(os.urandom(1 << 20) + bytes(1 << 20))
    store = tmp_path / "store/vm1"
    command = [sys.executable, "-m", "imagefs.cli", "split", "--format", "raw", str(tmp_path / "raw"), str(store)]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=60)
    return store


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    while (left := kernel.topmost(str(path))) is not None:
        kernel.detach(left)


def documented(text: str, image: Path, mountpoint: Path, tmp_path: Path) -> str:
    """A piece of the documentation, for the places of a test."""
    for shown, real in (
        (SOURCE, image),
        (MOUNTPOINT, mountpoint),
        ("/var/cache/imagefs", tmp_path / "cache"),
        ("/var/log/imagefs-vm1.log", tmp_path / "log"),
    ):
        assert shown in text
        text = text.replace(shown, str(real))
    return text


def check(image: Path, mountpoint: Path, tmp_path: Path) -> None:
    raw = (tmp_path / "raw").read_bytes()
    assert (mountpoint / "memory").read_bytes() == raw
    assert (mountpoint / "native").read_bytes() == raw
    mounted = kernel.topmost(str(mountpoint))
    assert mounted is not None
    assert (mounted.filesystem_type, mounted.source) == ("fuse.imagefs", str(image))
    assert any((tmp_path / "cache").iterdir())
    subprocess.run(["umount", mountpoint], check=True, timeout=20)
    wait_until(lambda: "unmounted" in (tmp_path / "log").read_text(), "the daemon ends")


@pytest.mark.usefixtures("helper")
def test_fstab(image: Path, mountpoint: Path, tmp_path: Path) -> None:
    line = next(line for line in DOCUMENT.read_text().splitlines() if line.split()[:1] == [SOURCE])
    fstab = tmp_path / "fstab"
    fstab.write_text(documented(line, image, mountpoint, tmp_path).strip() + "\n")
    for _ in range(2):
        # The second time it is mounted already, which mount -a sees by its source.
        subprocess.run(["mount", "-a", "-T", fstab], check=True, timeout=60)
    check(image, mountpoint, tmp_path)


@pytest.mark.usefixtures("helper")
def test_mount_unit(image: Path, mountpoint: Path, tmp_path: Path) -> None:
    text = documented(DOCUMENT.read_text(), image, mountpoint, tmp_path)
    unit = text[text.index("    [Unit]") : text.index("    WantedBy")]
    settings = dict(line.strip().split("=", 1) for line in unit.splitlines() if "=" in line)
    command = ["mount", settings["What"], settings["Where"], "-t", settings["Type"], "-o", settings["Options"]]
    subprocess.run(command, check=True, timeout=60)
    check(image, mountpoint, tmp_path)


@pytest.mark.usefixtures("helper")
def test_failure_reaches_mount(mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for options, status, reason in (
        ("nocache", 32, "vm1: no such object"),
        ("nocache,colour=blue", 1, "unknown option: colour=blue"),
    ):
        command = ["mount", "-v", "-n", "-t", "imagefs", f"{tmp_path}/store/vm1", str(mountpoint), "-o", options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == status
        assert reason in done.stderr
    assert kernel.topmost(str(mountpoint)) is None


def test_help_names_every_option() -> None:
    command = [sys.executable, "-m", "imagefs.cli.mount", "--help"]
    text = subprocess.check_output(command, env=environment(), text=True, timeout=30)
    table = DOCUMENT.read_text().split("## Options", 1)[1].split("`ro`, `nosuid`", 1)[0]
    for row in table.splitlines():
        for word in row.split("|")[1:2]:
            for name in word.replace(",", " ").replace("`", " ").split():
                assert name == "option" or set(name) == {"-"} or name in text, name


def test_relative_source(image: Path, mountpoint: Path) -> None:
    """It is made absolute before the daemon leaves for the root directory."""
    command = [sys.executable, "-m", "imagefs.cli.mount", "store/vm1", "mnt", "-o", "nocache"]
    subprocess.run(command, env=environment(), cwd=image.parents[1], check=True, timeout=30)
    mounted = kernel.topmost(str(mountpoint))
    assert mounted is not None
    assert mounted.source == str(image)
    subprocess.run(["umount", mountpoint], check=True, timeout=20)
