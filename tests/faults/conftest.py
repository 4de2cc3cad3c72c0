"""A store with images, a web server before it, and mounts that are gone after each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.nginx import Nginx

from tests.faults.images import RealImage, memory_of, split_raw
from tests.faults.mounts import Mounter
from tests.mount.conftest import watchdog

__all__ = ["watchdog"]

WINDOWS = 64
ZERO_WINDOWS = (range(20, 24), range(60, 64))


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> RealImage:
    """4 MiB of raw memory in a store that no test may change."""
    directory = tmp_path_factory.mktemp("pristine")
    return split_raw(directory, directory / "store", "vm1", memory_of(WINDOWS, 1, ZERO_WINDOWS))


@pytest.fixture
def image(pristine: RealImage, tmp_path: Path) -> RealImage:
    """The same in a store of the test's own."""
    shutil.copytree(pristine.store, tmp_path / "store")
    return RealImage(tmp_path / "store", pristine.name, pristine.native, pristine.memory)


@pytest.fixture
def server(image: RealImage) -> Iterator[Nginx]:
    with Nginx(image.store) as nginx:
        yield nginx


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounter]:
    with Mounter(tmp_path) as mounter:
        yield mounter
