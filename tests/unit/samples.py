"""Small valid images of every format, for the tests and the fuzzer that treat all formats alike.

A format's samples are in a module ``tests/unit/samples_FORMAT.py`` with a list ``SAMPLES``; it is found by its name,
there is nothing to register. One sample for each shape of the format that a reader treats differently is enough; some
kilobytes each.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

import tests.unit
from imagefs.image.geometry import PAGE_SIZE


@dataclass(frozen=True)
class Length:
    """A field that says how much of something follows: with a value of ``refused`` in it, the image must be refused.

    All ones and all ones but the sign bit are tried beside these.
    """

    name: str
    at: int
    size: int
    order: str = "big"
    """Of its bytes: ``big`` or ``little``."""
    file: str = ""
    refused: tuple[int, ...] = ()

    @property
    def extremes(self) -> tuple[int, ...]:
        return (*self.refused, (1 << 8 * self.size) - 1, (1 << 8 * self.size - 1) - 1)


def _never(file: str, length: int) -> bool:
    return False


@dataclass(frozen=True)
class Sample:
    """One valid image.

    ``files`` are its files by name; what is split is the file ``source``, or the directory with all of them where that
    is empty. ``memory`` are those that go with ``--memory``.
    """

    name: str
    """Unique; begins with the format's name."""
    format: str
    """As ``--format`` takes it."""
    files: Mapping[str, bytes]
    source: str = ""
    memory: tuple[str, ...] = ()
    lengths: tuple[Length, ...] = ()
    may_end: Callable[[str, int], bool] = field(default=_never)
    """Whether a file may end after so many bytes: the image is another one then, and nothing is wrong with it."""
    tries: int = 250
    """Places tried in a file at most: few where reading it starts other programs."""
    sparse: frozenset[str] = frozenset()
    """Files whose pages of zeros are holes."""

    @classmethod
    def of_file(
        cls,
        name: str,
        format: str,
        data: bytes,
        lengths: tuple[Length, ...] = (),
        may_end: Callable[[str, int], bool] = _never,
        tries: int = 250,
    ) -> Sample:
        return cls(name, format, {"image": data}, "image", (), lengths, may_end, tries)

    def write(self, directory: Path, changed: Mapping[str, bytes] | None = None) -> tuple[Path, list[Path]]:
        """The files, some of them ``changed``, into a directory. What to split, and what goes with ``--memory``."""
        for name, data in {**self.files, **(changed or {})}.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write_file(path, name, data)
        return directory / self.source, [directory / name for name in self.memory]

    def write_file(self, path: Path, name: str, data: bytes) -> None:
        """One of the files, with its holes."""
        if name in self.sparse:
            write_sparse(path, data)
        else:
            path.write_bytes(data)


def write_sparse(path: Path, data: bytes) -> None:
    """A file whose pages of zeros are holes."""
    with open(path, "wb") as file:
        for at in range(0, len(data), PAGE_SIZE):
            if any(data[at : at + PAGE_SIZE]):
                file.seek(at)
                file.write(data[at : at + PAGE_SIZE])
        file.truncate(len(data))


@cache
def all_samples() -> tuple[Sample, ...]:
    """Those of all modules ``samples_*``, by name."""
    found: dict[str, Sample] = {}
    for module in pkgutil.iter_modules(tests.unit.__path__):
        if module.name.startswith("samples_"):
            for sample in import_module(f"tests.unit.{module.name}").SAMPLES:
                assert sample.name.startswith(sample.format), f"{sample.name} is of format {sample.format}"
                assert sample.name not in found, f"two samples {sample.name}"
                found[sample.name] = sample
    return tuple(found[name] for name in sorted(found))
