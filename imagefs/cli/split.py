"""``imagefs split SOURCE STORE/NAME``."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from imagefs.cli.signals import signals_as_exceptions
from imagefs.cli.terminal import progress_bar, size_text
from imagefs.errors import UsageError
from imagefs.formats import format_names, open_capture
from imagefs.store.directory import DirectoryStore
from imagefs.store.location import Location, open_store, parse_location
from imagefs.store.lock import SplitLock
from imagefs.store.writer import Written, write_image

DESCRIPTION = """\
Split a saved VM into an image in a store: its device state, and its memory as
compressed, verified chunks that can be fetched one by one.

    imagefs split vm.save store/vm1
    cat vm.save | imagefs split - store/vm1
    imagefs split --memory ram.img vm.state store/vm1
    imagefs split --memory mem --memory diff vmstate store/vm1
    imagefs split snapshot-directory store/vm1

The store is a directory; it is created if it is missing. If STORE/NAME exists, the name is
moved to the new image once all of it is written. Equal chunks are stored once per store. If
the split fails or is interrupted, nothing of it is left in the store, but for chunks that another
split into the same store, running at that time, may refer to.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.add_argument(
        "source", metavar="SOURCE", help="the saved VM, a file or a directory; - reads it from standard input"
    )
    parser.add_argument("target", metavar="STORE/NAME", help="the image to make")
    parser.add_argument("--format", choices=format_names(), help="what SOURCE is (default: recognised)")
    parser.add_argument(
        "--memory",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="the file with the memory where SOURCE has none: a QEMU state saved with x-ignore-shared, the state of a"
        " Firecracker snapshot; again for each diff laid over it",
    )
    parser.add_argument("--snapshot", metavar="NAME", help="which snapshot of a qcow2 image (default: the only one)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")


def run(args: argparse.Namespace) -> int:
    if args.source == "-" and sys.stdin is None:
        raise UsageError("standard input is closed")
    source = sys.stdin.buffer if args.source == "-" else Path(args.source)
    with signals_as_exceptions():
        split_stream(
            source,
            args.target,
            memory_files=args.memory,
            format=args.format,
            snapshot=args.snapshot,
            quiet=args.quiet,
        )
    return 0


def split_stream(
    source: BinaryIO | Path,
    target: str,
    *,
    memory_files: Sequence[Path] = (),
    format: str | None = None,
    snapshot: str | None = None,
    quiet: bool = False,
) -> None:
    """Split ``source`` into ``target`` and say what became of it; on any failure the store is as it was before."""
    where = parse_location(target)
    made = _missing(Path(where.store_location).absolute())
    begun = time.monotonic()
    try:
        store = open_store(where, write=True)
        assert isinstance(store, DirectoryStore)
        with SplitLock(store) as lock:
            try:
                with (
                    open_capture(
                        source, spool_dir=store.root, format=format, memory_files=memory_files, snapshot=snapshot
                    ) as capture,
                    progress_bar("splitting", quiet=quiet) as progress,
                ):
                    written = write_image(store, where.name, capture, progress=progress, lock=lock)
            except BaseException:
                if made:
                    _remove_empty(store, lock)
                raise
    except BaseException:
        for directory in made:
            with suppress(OSError):
                directory.rmdir()
        raise
    if not quiet:
        print(_summary(where, written, time.monotonic() - begun))


def _missing(path: Path) -> list[Path]:
    """The directories on the way to ``path`` that do not exist, the lowest first."""
    return [each for each in (path, *path.parents) if not each.exists()]


def _remove_empty(store: DirectoryStore, lock: SplitLock) -> None:
    """A store that was made for a split that failed goes with it, unless something else is in it by now."""
    with suppress(OSError):
        if lock.alone() and next(iter(store.keys()), None) is None:
            shutil.rmtree(store.root)


def _summary(where: Location, written: Written, seconds: float) -> str:
    return (
        f"{where}: {size_text(written.memory_size)} of memory, {size_text(written.content_size)} in use; "
        f"{size_text(written.stored_bytes)} to fetch, {size_text(written.new_bytes)} new in the store; {seconds:.1f} s"
    )
