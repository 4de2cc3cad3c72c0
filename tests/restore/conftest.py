"""The program that plays the VMM, and directories that look like mounts of its image."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.restore.vmms import Program

PAGES = 4096


@pytest.fixture(scope="session")
def vmm(tmp_path_factory: pytest.TempPathFactory) -> Program:
    source = Path(__file__).with_name("vmm.c")
    program = tmp_path_factory.mktemp("vmm") / "vmm"
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *flags, source, "-o", program], check=True)
    return Program(program)


@pytest.fixture(scope="session")
def memory(vmm: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 16 MiB."""
    path = tmp_path_factory.mktemp("memory") / "memory"
    vmm.make_image(path, PAGES)
    return path


@pytest.fixture
def mountpoint(memory: Path, tmp_path: Path) -> Path:
    """What a mount of an image without a VMM of its own shows."""
    directory = tmp_path / "mnt"
    directory.mkdir()
    (directory / "memory").hardlink_to(memory)
    (directory / "state").touch()
    (directory / "metadata.json").write_text(json.dumps({"restore": {}, "source": {"format": "raw"}}))
    return directory
