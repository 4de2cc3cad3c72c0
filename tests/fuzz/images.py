"""The readers of other programs' memory images, format by format, and their recognition.

An input is a byte that chooses one of the format's shapes (one file, or a pipe, or the files of one of its samples),
and the files' bytes; where there are several, each but the last has its length (u32, little-endian) in front.
"""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from imagefs.errors import NoSpaceError, UnsupportedInputError, UsageError
from imagefs.formats import FORMATS, open_capture
from imagefs.image.capture import Capture
from imagefs.image.native_files import spans
from imagefs.image.native_reader import NativeReader
from tests.fuzz.target import CORPUS, Target
from tests.unit.samples import Sample, all_samples, write_sparse

LOOKED_AT = 1 << 20
"""Bytes of memory and native file that are read of what was taken: a hostile file may have a terabyte of zeros."""


@dataclass(frozen=True)
class Shape:
    """Which files there are. The image comes through a pipe where it is ``piped``."""

    names: tuple[str, ...]
    source: str
    memory: tuple[str, ...]
    piped: bool = False
    sparse: frozenset[str] = frozenset()

    def decode(self, data: bytes) -> dict[str, bytes]:
        files = {}
        for name in self.names[:-1]:
            length = int.from_bytes(data[:4], "little")
            files[name] = data[4 : 4 + length]
            data = data[4 + length :]
        return {**files, self.names[-1]: data}

    def encode(self, files: Mapping[str, bytes]) -> bytes:
        pieces = [struct.pack("<I", len(files[name])) + files[name] for name in self.names[:-1]]
        return b"".join(pieces) + files[self.names[-1]]


PLAIN = [Shape(("image",), "image", ()), Shape(("image",), "image", (), piped=True)]


def shapes_of(sample: Sample) -> list[Shape]:
    names = tuple(sorted(sample.files))
    if names == ("image",) and not sample.sparse:
        return PLAIN
    return [Shape(names, sample.source, sample.memory, sparse=sample.sparse)]


def targets() -> Iterator[Target]:
    for known in FORMATS:
        samples = [sample for sample in all_samples() if sample.format == known.name]
        shapes = list(dict.fromkeys(shape for sample in samples for shape in shapes_of(sample))) or PLAIN
        seeds = [
            bytes([shapes.index(shape)]) + shape.encode(sample.files)
            for sample in samples
            for shape in shapes_of(sample)
        ]
        if shapes[: len(PLAIN)] == PLAIN:
            seeds += [b"\0" + path.read_bytes() for path in sorted((CORPUS / known.name).glob("*"))]
        yield Target(known.name, partial(_split, known.name, shapes), seeds)
    heads = [sample.files[sample.source][: 64 << 10] for sample in all_samples() if sample.source]
    yield Target("recognition", partial(_split, None, PLAIN), [b"\0" + head for head in heads])


def _split(format: str | None, shapes: Sequence[Shape], data: bytes) -> None:
    if not data:
        return
    shape = shapes[data[0] % len(shapes)]
    files = shape.decode(data[1:])
    with tempfile.TemporaryDirectory() as directory, suppressed():
        root = Path(directory)
        spool_dir = root / "spool"
        spool_dir.mkdir()
        source: Path | BinaryIO
        if shape.piped:
            source = io.BytesIO(files["image"])
        else:
            for name, content in files.items():
                path = root / "files" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if name in shape.sparse:
                    write_sparse(path, content)
                else:
                    path.write_bytes(content)
            source = root / "files" / shape.source
        memory = [root / "files" / name for name in shape.memory]
        with open_capture(source, spool_dir=spool_dir, format=format, memory_files=memory) as capture:
            _check(capture, shape.source, files)


@contextmanager
def suppressed() -> Iterator[None]:
    """What a bad image may get."""
    try:
        yield
    except (UnsupportedInputError, UsageError, NoSpaceError) as error:
        if "\n" in str(error):
            raise AssertionError("of several lines") from error


def _check(capture: Capture, source: str, files: Mapping[str, bytes]) -> None:
    """What was taken can be read, and gives the files again."""
    assert capture.memory.size == capture.geometry.size
    capture.memory.read_at(0, min(LOOKED_AT, capture.memory.size))
    capture.state.read_at(0, min(LOOKED_AT, capture.state.size))
    native = NativeReader(capture.native, capture.memory)
    shown = list(spans(capture.native_files)) or [(source, 0, native.size)]
    for path, start, end in shown:
        if path in files:
            assert end - start == len(files[path]), (
                f"{path} has {end - start} bytes in native, {len(files[path])} split"
            )
            assert native.read_at(start, end - start) == files[path], f"{path} in native is not what was split"
