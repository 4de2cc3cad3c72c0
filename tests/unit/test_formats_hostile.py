"""What every format owes to whoever brings a damaged file: see samples.py for how a format takes part.

Cut anywhere: refused, with field and offset, and nothing is left in the store. Lengths at their extremes: alike.
Any other bytes in any place: refused, or taken for what they are, so that ``native`` is that file again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from imagefs.cli.split import split_stream
from imagefs.errors import ImagefsError, UnsupportedInputError, UsageError
from imagefs.formats import FORMATS, open_capture
from imagefs.image.capture import Capture
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native import ENTRY_SIZE, PAGES, Entry
from imagefs.image.native_files import spans
from imagefs.image.native_reader import NativeReader
from tests.unit.samples import Length, Sample, all_samples

IN_THE_STORE = 6
"""Of the places that are tried, chosen anew in each run, so many go through a whole split."""

every_sample = pytest.mark.parametrize("sample", all_samples(), ids=lambda sample: sample.name)

# Damage may make the guest's page tables lead anywhere, or something else worth a warning.
pytestmark = pytest.mark.expect_log("")


class Bench:
    """The files of a sample in a directory, and what becomes of them with one changed."""

    def __init__(self, sample: Sample, directory: Path) -> None:
        self.sample = sample
        self.spool_dir = directory / "spool"
        self.store = directory / "store"
        self.files = directory / "files"
        self.files.mkdir()
        self.spool_dir.mkdir()
        self.source, self.memory = sample.write(self.files)

    @contextmanager
    def changed(self, file: str, data: bytes) -> Iterator[None]:
        path = self.files / file
        self.sample.write_file(path, file, data)
        try:
            yield
        finally:
            self.sample.write_file(path, file, self.sample.files[file])

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        with open_capture(
            self.source, spool_dir=self.spool_dir, format=self.sample.format, memory_files=self.memory
        ) as capture:
            yield capture

    def refusal(self) -> ImagefsError | None:
        try:
            with self.capture() as capture:
                read_everything(capture)
        except (UnsupportedInputError, UsageError) as error:
            return error
        return None

    def split(self) -> None:
        split_stream(self.source, f"{self.store}/vm", format=self.sample.format, memory_files=self.memory, quiet=True)

    def native(self) -> dict[str, bytes]:
        """What ``native`` is, by the names of the sample's files; ``source`` where it is one file."""
        with self.capture() as capture:
            data = read_everything(capture)
            if not capture.native_files:
                return {self.sample.source: data}
            return {path: data[start:end] for path, start, end in spans(capture.native_files)}


def read_everything(capture: Capture) -> bytes:
    """All of the native file; and of the memory as much as that file can have filled."""
    template = NativeReader(capture.native, capture.memory)
    data = bytes(template.read_at(0, template.size))
    capture.state.read_at(0, capture.state.size)
    capture.memory.read_at(0, min(capture.memory.size, 16 * PAGE_SIZE))
    return data


@pytest.fixture
def bench(sample: Sample) -> Iterator[Bench]:
    # Thousands of files are made and deleted, which a disk's journal takes ten times as long for.
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Bench(sample, Path(directory))


def page_bodies(bench: Bench, file: str) -> list[range]:
    """Where the bytes of guest pages are in a file, as its native template has them: any byte there is as good."""
    found = []
    with bench.capture() as capture:
        entries = bytes(capture.native.entries.read_at(0, capture.native.entries.size))
        places = {path: (start, end) for path, start, end in spans(capture.native_files)}
        places = places or {bench.sample.source: (0, capture.native.size)}
    if file not in places:
        return []
    first, last = places[file]
    for at in range(0, len(entries), ENTRY_SIZE):
        entry = Entry.unpack(entries, at)
        if entry.kind == PAGES:
            starts = range(entry.native_offset + entry.literal_length, entry.end, entry.record_size)
            bodies = [range(start + 2, start + PAGE_SIZE - 1) for start in starts if first <= start < last]
            found += [range(body.start - first, body.stop - first) for body in bodies]
    return found


def places(bench: Bench, file: str, rng: random.Random) -> list[int]:
    """Offsets worth a try: outside of pages, and a few inside."""
    candidates = set(range(len(bench.sample.files[file])))
    for body in page_bodies(bench, file):
        candidates -= set(body) - set(rng.sample(body, 3))
    return sorted(rng.sample(sorted(candidates), min(bench.sample.tries, len(candidates))))


@every_sample
def test_sample_is_taken(bench: Bench) -> None:
    """And recognised without ``--format``, unless nothing marks the format."""
    assert bench.refusal() is None
    native = bench.native()
    assert native == {file: bench.sample.files[file] for file in native}
    assert bench.sample.source in native if bench.sample.source else native.keys() == bench.sample.files.keys()
    if bench.sample.format != "raw":
        with open_capture(bench.source, spool_dir=bench.spool_dir, memory_files=bench.memory) as capture:
            assert capture.source_format == bench.sample.format
    bench.split()
    assert bench.store.exists()


@every_sample
def test_cut_anywhere(bench: Bench, rng: random.Random) -> None:
    for file, data in bench.sample.files.items():
        cuts = [length for length in places(bench, file, rng) if not bench.sample.may_end(file, length)]
        whole = set(rng.sample(cuts, min(IN_THE_STORE, len(cuts))))
        for length in cuts:
            with bench.changed(file, data[:length]):
                error = bench.refusal()
                # Which of two files that do not fit together is the wrong one, nobody knows.
                if file not in bench.sample.memory or not isinstance(error, UsageError):
                    check_refused(error, f"{file} cut at {length}")
                if length in whole:
                    check_nothing_left(bench)


def check_refused(error: ImagefsError | None, what: str) -> None:
    assert "\n" not in str(error)
    assert isinstance(error, UnsupportedInputError), f"{what}: {error}"
    assert error.field, f"{what}: {error}"
    assert error.offset is not None, f"{what}: {error}"


def check_nothing_left(bench: Bench) -> None:
    with pytest.raises((UnsupportedInputError, UsageError)):
        bench.split()
    assert not bench.store.exists()


@pytest.mark.parametrize(
    ("sample", "length"),
    [(sample, length) for sample in all_samples() for length in sample.lengths],
    ids=lambda value: value.name,
)
def test_lengths_at_their_extremes(bench: Bench, length: Length) -> None:
    file = length.file or bench.sample.source
    data = bench.sample.files[file]
    for value in length.extremes:
        changed = patched(data, length.at, value.to_bytes(length.size, length.order))  # type: ignore[arg-type]
        with bench.changed(file, changed):
            check_refused(bench.refusal(), f"{length.name} {value:#x}")
            check_nothing_left(bench)


def patched(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at + len(piece) :]


PIECES: Sequence[bytes] = (b"\0", b"\xff", bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\xff" * 8)


@every_sample
def test_any_bytes_anywhere(bench: Bench, rng: random.Random) -> None:
    """Refused, or taken for what they are."""
    for file, data in bench.sample.files.items():
        for at in places(bench, file, rng):
            piece = rng.choice(PIECES)
            changed = patched(data, at, piece[: len(data) - at])
            with bench.changed(file, changed):
                if bench.refusal() is None:
                    assert bench.native().get(file, changed) == changed, f"{file} with {piece.hex()} at {at}"


@every_sample
def test_other_first_bytes(bench: Bench) -> None:
    """What marks a format is looked at; only of raw memory nothing is known."""
    refusals = []
    for file, data in bench.sample.files.items():
        with bench.changed(file, patched(data, 0, b"imagefs?")):
            refusals.append(bench.refusal())
    assert any(refusals) == (bench.sample.format != "raw")


def test_every_format_has_samples() -> None:
    have = {sample.format for sample in all_samples()}
    assert [known.name for known in FORMATS if known.name not in have] == []
