"""What a pager takes from a mount besides its pages: the order of a working set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imagefs.cache.disk import WORKING_SET
from imagefs.restore.mountpoint import MountedImage
from imagefs.restore.pager_sources import opened
from tests.restore.conftest import PAGES


@pytest.mark.parametrize(
    ("text", "order"),
    [
        (b"7 1\n8 2\n9 1\n3 1\n4 1\n100 9\n", ((7, 3), (3, 2), (100, 1))),
        (b"7 1\n%d 1\n" % PAGES, ()),
        (b"7 1\nwhat?\n", ()),
        (b"", ()),
        (None, ()),
    ],
)
def test_order(mountpoint: Path, tmp_path: Path, text: bytes | None, order: tuple[tuple[int, int], ...]) -> None:
    """It is in the cache; what is damaged is no order at all."""
    cache = tmp_path / "cache"
    cache.mkdir()
    if text is not None:
        (cache / WORKING_SET).write_bytes(text)
    (mountpoint / ".imagefs").mkdir()
    (mountpoint / ".imagefs" / "status.json").write_text(json.dumps({"cache": {"path": str(cache)}}))
    with opened(MountedImage(mountpoint), trace=False) as sources:
        assert sources.order == order
