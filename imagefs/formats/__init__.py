"""Other programs' memory images, read in one pass into a :class:`~imagefs.image.capture.Capture`.

Each format is a module with an object ``FORMAT`` (:class:`~imagefs.formats.base.Format`), listed in ``FORMATS``. Its
samples, in ``tests/unit/samples_NAME.py``, take part in the tests of damaged input and in the fuzzing of all formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import (
    cloud_hypervisor,
    criu,
    elf_core,
    firecracker,
    kdump,
    libvirt_save,
    lime,
    qcow2,
    qemu_migration,
    raw,
    vmware,
    xen,
)
from imagefs.formats.base import Format, Input, Workspace
from imagefs.formats.structure import with_structure
from imagefs.image.capture import Capture

FORMATS: tuple[Format, ...] = (
    qemu_migration.FORMAT,
    libvirt_save.FORMAT,
    qcow2.FORMAT,
    xen.FORMAT,
    firecracker.FORMAT,
    cloud_hypervisor.FORMAT,
    criu.FORMAT,
    elf_core.FORMAT,
    kdump.FORMAT,
    vmware.FORMAT,
    lime.FORMAT,
    raw.FORMAT,
)
"""In the order in which messages list them."""

_SHOWN_MAGIC = 8
_SHOWN_NAMES, _LARGEST_LISTING = 8, 10_000

__all__ = ["FORMATS", "Format", "format_names", "open_capture"]


def format_names() -> list[str]:
    """What ``--format`` takes."""
    return [known.name for known in FORMATS]


@contextmanager
def open_capture(
    source: Path | BinaryIO,
    *,
    spool_dir: Path,
    format: str | None = None,
    memory_files: Sequence[Path] = (),
    snapshot: str | None = None,
) -> Iterator[Capture]:
    """Read a saved VM; the capture's sources live as long as the context.

    ``source`` is a path of a file or directory, or an open binary stream that is read to its end and need not be
    seekable. What must be kept is spooled in ``spool_dir``: up to the size of the guest's memory for streams, little
    for regular files. ``format`` is one of :func:`format_names`; without it the format is recognised from the first
    64 KiB.
    ``memory_files`` hold the memory where it is not in ``source`` itself: the RAM file of a stream saved with
    x-ignore-shared, for one. ``snapshot`` says which one of a file with several is meant.

    Raises UsageError, UnsupportedInputError and NoSpaceError.
    """
    with ExitStack() as stack:
        if isinstance(source, Path):
            stream = Input.of_path(source, stack)
        else:
            name = getattr(source, "name", None)
            stream = Input(source, name if isinstance(name, str) else "the input", regular=False)
        chosen = _named(format) if format is not None else _recognise(stream)
        stream.with_snapshot(snapshot)
        workspace = stack.enter_context(Workspace(spool_dir))
        capture = chosen.read(stream, workspace, memory_files)
        if stream.unasked_snapshot is not None:
            raise UsageError(f"--snapshot {snapshot}: {stream.name} is of format {chosen.name}, which has no snapshots")
        yield with_structure(capture)


def _named(name: str) -> Format:
    for known in FORMATS:
        if known.name == name:
            return known
    raise UsageError(f"--format {name}: unknown; known are {', '.join(format_names())}")


def _recognise(stream: Input) -> Format:
    matching = [known for known in FORMATS if known.matches(stream)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        names = " and ".join(known.name for known in matching)
        raise UnsupportedInputError(f"{stream.name} may be {names} ({_seen(stream)}); say which with --format")
    names = f"say which with --format ({', '.join(format_names())})"
    if stream.directory is not None:
        raise UnsupportedInputError(f"{stream.name} is of no known format: {_seen(stream)}; {names}")
    if not stream.head:
        raise UnsupportedInputError(f"{stream.name} is empty", field="magic", offset=0)
    raise UnsupportedInputError(
        f"{stream.name} is of no known format: {_seen(stream)}; {names}", field="magic", offset=0
    )


def _seen(stream: Input) -> str:
    if stream.directory is not None:
        names = sorted(entry.name for entry in islice(stream.directory.iterdir(), _LARGEST_LISTING))
        shown = ", ".join(map(ascii, names[:_SHOWN_NAMES])) + (", …" if len(names) > _SHOWN_NAMES else "")
        return f"it is a directory with {shown}" if names else "it is an empty directory"
    size = f" and has {stream.size:,} bytes" if stream.size is not None else ""
    return f"it begins with {stream.head[:_SHOWN_MAGIC].hex()}{size}"
