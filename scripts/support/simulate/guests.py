"""A recorded guest: its trace, and what its image says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from imagefs.cli.opening import image_reader
from imagefs.fetch.recording import Touch as Line
from imagefs.fetch.recording import parse_trace
from imagefs.image.capture import ByteSource
from imagefs.image.chunks import Codec
from imagefs.image.document import Document
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.index import walk_chunks
from imagefs.image.likely import groups
from imagefs.image.mappings import MappedPage, mapped_pages
from imagefs.image.streams import MEMORY
from imagefs.store.windows import encode_windows
from support.resume.site import IMAGE
from support.simulate.model import Touch
from support.simulate.record import TRACE


class Chunk(NamedTuple):
    """Of a window that is not all zeros."""

    pages: int
    """Bit i: its page i is not zero."""
    size: int
    """Bytes as they are fetched."""


@dataclass(frozen=True)
class RecordedGuest:
    name: str
    touches: list[Touch]
    """Of pages that are neither zero nor in the metadata object."""
    chunk_pages: int
    windows: int
    """Of all memory."""
    sizes: Mapping[int, int]
    """Bytes of each window that is not all zeros."""
    document: Document
    mapped: list[MappedPage]
    """By the first vCPU, in the order of virtual addresses."""
    likely: Mapping[str, list[int]]
    """Pages of the groups of imagefs/image/likely.py."""

    def page_of(self, physical: int) -> int | None:
        return self.document.geometry.page_of_pfn(physical // PAGE_SIZE)


def load_guest(directory: Path, chunk_pages: int | None = None) -> RecordedGuest:
    """What :mod:`support.simulate.record` has left there. Raises StoreError, OSError where it has not.

    With ``chunk_pages`` as if it had been split into such windows.
    """
    with image_reader(str(directory / "store" / IMAGE)) as reader:
        image = reader.image
        memory, document = reader.source(MEMORY), image.metadata.checked
        stream = image.manifest.streams[MEMORY]
        if chunk_pages is None:
            chunk_pages = image.manifest.chunk_pages
            found = walk_chunks(stream, reader.block)
            chunks = {number: Chunk(ref.pages, ref.place.length) for number, ref in found}
        else:
            chunks = _chunks(memory, chunk_pages)
        here = {page + i for page, data in image.metadata.pages for i in range(len(data) // PAGE_SIZE)}
        lines = parse_trace((directory / TRACE).read_bytes())
        return RecordedGuest(
            name=directory.name,
            touches=touches_of(lines, chunks, here, chunk_pages),
            chunk_pages=chunk_pages,
            windows=stream.windows(chunk_pages),
            sizes={window: chunk.size for window, chunk in chunks.items()},
            document=document,
            mapped=[p for vcpu in document.vcpus[:1] for p in mapped_pages(memory, document.geometry, vcpu)],
            likely={
                name: list(pages)
                for name, pages in groups(memory, document.geometry, document.vcpus, document.kinds).items()
            },
        )


def _chunks(memory: ByteSource, chunk_pages: int) -> dict[int, Chunk]:
    with ThreadPoolExecutor(2) as pool:
        windows = encode_windows(memory, chunk_pages, Codec(), lambda _: {}, pool, lambda _: None)
        return {each.number: Chunk(each.pages, len(each.payload)) for each in windows}


def touches_of(lines: Iterable[Line], chunks: Mapping[int, Chunk], here: set[int], chunk_pages: int) -> list[Touch]:
    """Each page of a trace that has to be fetched; pages of ``here`` and zero pages are with the guest anyway."""
    touches: list[Touch] = []
    last = None
    for line in lines:
        for page in range(line.page, line.page + line.count):
            window, slot = divmod(page, chunk_pages)
            if page not in here and window in chunks and chunks[window].pages >> slot & 1:
                touches.append(Touch(0.0 if last is None else max(0.0, line.seconds - last), page, window))
                last = line.seconds
    return touches
