"""An image with a working set, for tests of whatever reads one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from imagefs.image.capture import PageKind
from imagefs.image.chunks import Codec
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.index import StreamRef
from imagefs.image.setobject import SetBlock, SetParser
from imagefs.image.setverify import PageRun, SetVerifier
from imagefs.image.streams import MEMORY
from imagefs.image.workingset import WorkingSet, recorded
from imagefs.store.base import working_set_key
from imagefs.store.directory import DirectoryStore
from imagefs.store.reader import Image, ImageReader, load_image
from imagefs.store.workingset import publish
from imagefs.store.writer import write_image
from tests.unit.captures import capture_of, memory_of


@dataclass
class SetImage:
    """``parts`` taken away, so that a set has to carry the index blocks."""

    store: DirectoryStore
    image: Image
    memory: bytes

    @classmethod
    def make(
        cls, root: Path, pages: int = 700, seed: int = 3, zeros: float = 0.3, chunk_pages: int = 16, parts: bool = True
    ) -> SetImage:
        memory = memory_of(pages, seed, zeros)
        store = DirectoryStore(root, create=True)
        capture = capture_of(memory, essential=(PageKind(0, 1, "pml4"),))
        write_image(store, "vm", capture, chunk_pages=chunk_pages)
        image = load_image(store, "vm", Codec())
        if not parts:
            image = replace(image, metadata=replace(image.metadata, parts={}))
        return cls(store, image, memory)

    @property
    def key(self) -> str:
        return working_set_key(self.image.digest)

    @property
    def stream(self) -> StreamRef:
        return self.image.manifest.streams[MEMORY]

    def page(self, number: int) -> bytes:
        return self.memory[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]

    def is_zero(self, number: int) -> bool:
        return not any(self.page(number))

    def publish(self, wanted: Iterable[int] | WorkingSet) -> bytes:
        """The object's bytes."""
        each = wanted if isinstance(wanted, WorkingSet) else recorded(wanted)
        publish(ImageReader(self.store, self.image, Codec()), each, Codec())
        return self.store.get(self.key)

    def read(self, data: bytes, piece: int = 1 << 20, image: Image | None = None) -> list[PageRun]:
        """Parsed in pieces of so many bytes and verified. CorruptObjectError."""
        image = image or self.image
        chunk_pages = image.manifest.chunk_pages
        parser = SetParser(image.digest, chunk_pages, key="set", origin="test")
        verifier = SetVerifier(self.stream, chunk_pages, image.metadata.parts, Codec(), key="set", origin="test")
        runs: list[PageRun] = []
        for at in range(0, len(data), piece):
            for record in parser.feed(data[at : at + piece]):
                if isinstance(record, SetBlock):
                    verifier.block(record)
                else:
                    runs += verifier.pages(record)
        parser.finish()
        return runs

    def check(self, runs: Iterable[PageRun]) -> set[int]:
        """That these are pages of the memory; their numbers."""
        found: set[int] = set()
        for run in runs:
            count = min(run.count, len(self.memory) // PAGE_SIZE - run.first)
            assert run.data[: count * PAGE_SIZE] == self.memory[run.first * PAGE_SIZE :][: count * PAGE_SIZE]
            found.update(range(run.first, run.first + count))
        return found
