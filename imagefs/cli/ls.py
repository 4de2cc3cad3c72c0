"""``imagefs ls STORE/NAME``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain

from imagefs.cli.opening import image_reader
from imagefs.cli.terminal import printable
from imagefs.image.capture import PAGE_KINDS
from imagefs.image.geometry import Geometry
from imagefs.image.index import walk_chunks
from imagefs.image.metadata import Metadata
from imagefs.image.streams import CONFIG_PREFIX, MEMORY, STATE
from imagefs.store.reader import ImageReader

DESCRIPTION = """\
List what a mount of the image will show: size in bytes and name of each file. With --pages, the
guest's page frames instead: first frame number, number of frames, and whether the image has data
for them or knows them to be zero. With --kind, the frames of one kind.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("image", metavar="STORE/NAME", help="a path or an http(s) URL")
    parser.add_argument("--pages", action="store_true", help="list page frames, in runs")
    parser.add_argument("--kind", choices=PAGE_KINDS, help="list the frames of one kind: page tables, kernel text")


def run(args: argparse.Namespace) -> int:
    with image_reader(args.image) as reader:
        if args.kind:
            lines = _frames_of_kind(reader.image.metadata, args.kind)
        elif args.pages:
            lines = _page_runs(reader)
        else:
            lines = _files(reader)
        for line in lines:
            print(line)
    return 0


def _files(reader: ImageReader) -> Iterator[str]:
    streams = reader.image.manifest.streams
    sizes = {
        MEMORY: streams[MEMORY].size,
        STATE: streams[STATE].size,
        **_native(reader.image.metadata),
        **{name: stream.size for name, stream in streams.items() if name.startswith(CONFIG_PREFIX)},
    }
    width = max(len(str(size)) for size in sizes.values())
    for name, size in sizes.items():
        yield f"{size:{width}} {printable(name)}"


def _native(metadata: Metadata) -> dict[str, int]:
    files = metadata.checked.native_files
    return {f"native/{f.path}": f.size for f in files} if files else {"native": metadata.checked.native_bytes}


def _frames_of_kind(metadata: Metadata, kind: str) -> Iterator[str]:
    geometry = metadata.geometry
    for tables in metadata.kinds:
        if tables.kind == kind:
            yield from _run_lines(geometry, tables.first, tables.count, kind)


def _page_runs(reader: ImageReader) -> Iterator[str]:
    geometry = reader.image.metadata.geometry
    cursor = 0
    for first, count in chain(_data_runs(reader), [(geometry.pages, 0)]):
        yield from _run_lines(geometry, cursor, first - cursor, "zero")
        yield from _run_lines(geometry, first, count, "data")
        cursor = first + count


def _data_runs(reader: ImageReader) -> Iterator[tuple[int, int]]:
    """``(first page, count)`` of the memory's pages that are not zero, neighbours joined."""
    chunk_pages = reader.image.manifest.chunk_pages
    pages = reader.image.metadata.geometry.pages
    begin = end = 0
    for window, chunk in walk_chunks(reader.image.manifest.streams[MEMORY], reader.block):
        # Behind the end of the memory no page is; nobody checks what a leaf says of them.
        for slot in range(min(chunk_pages, pages - window * chunk_pages)):
            if chunk.pages >> slot & 1:
                page = window * chunk_pages + slot
                if page != end:
                    if end > begin:
                        yield begin, end - begin
                    begin = page
                end = page + 1
    if end > begin:
        yield begin, end - begin


def _run_lines(geometry: Geometry, first: int, count: int, what: str) -> Iterator[str]:
    """One line a run of page frames: a run of pages is cut where guest-physical memory has a hole."""
    while count:
        pfn = geometry.pfn_of_page(first)
        run = next(begin + frames - pfn for begin, frames in geometry.pfn_runs() if begin <= pfn < begin + frames)
        run = min(run, count)
        yield f"{pfn:#09x} {run:8} {what}"
        first += run
        count -= run
