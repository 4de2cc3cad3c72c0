"""Recognising reads the first 64 KiB of the input and no more, and one format at most says that it is its own."""

from __future__ import annotations

import io
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from imagefs.formats import FORMATS
from imagefs.formats.base import HEAD_SIZE, Input
from tests.unit.samples import Sample, all_samples

LONG = [sample for sample in all_samples() if sample.source and sample.format != "raw"]


class Counted(io.RawIOBase):
    """An input that is followed by zeros without an end, and counts what was read of it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.taken = 0

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._data[self.taken : self.taken + len(buffer)].ljust(len(buffer), b"\0")
        buffer[:] = piece
        self.taken += len(piece)
        return len(piece)


@pytest.mark.parametrize("sample", LONG, ids=[sample.name for sample in LONG])
def test_an_input_without_an_end(sample: Sample) -> None:
    stream = Counted(sample.files[sample.source])
    source = Input(cast(BinaryIO, stream), sample.source, regular=False)
    assert [known.name for known in FORMATS if known.matches(source)] == [sample.format]
    assert stream.taken == HEAD_SIZE == 65536


@pytest.mark.parametrize("sample", all_samples(), ids=[sample.name for sample in all_samples()])
def test_one_format_at_most(tmp_path: Path, sample: Sample) -> None:
    path, _ = sample.write(tmp_path)
    with ExitStack() as stack:
        source = Input.of_path(path, stack)
        expected = [] if sample.format == "raw" else [sample.format]
        assert [known.name for known in FORMATS if known.matches(source)] == expected
