"""Writing an image into a store: formats -> image -> store, one pass over each stream, bounded memory.

Written in the order packs, index, metadata, manifest, name: whoever reads the store sees the image whole or not at
all. A split that fails deletes what it has added, unless others are running that may refer to it; what stays then, or
after a crash, is found by its digests and used by the next split of the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from imagefs.errors import (
    CorruptObjectError,
    MissingObjectError,
    StoreError,
    UnsupportedInputError,
    UsageError,
)
from imagefs.image.capture import ByteSource, BytesSource, Capture
from imagefs.image.chunks import MAX_CHUNK_PAGES, Codec
from imagefs.image.geometry import DEFAULT_CHUNK_PAGES, PAGE_SIZE
from imagefs.image.index import PayloadRef
from imagefs.image.manifest import MAX_MANIFEST_SIZE, MAX_NAME_SIZE, Manifest, Name
from imagefs.image.metadata import encode_metadata
from imagefs.image.native_files import check_files, is_file_name
from imagefs.image.streams import (
    CONFIG_PREFIX,
    MEMORY,
    NATIVE_ENTRIES,
    NATIVE_EXCEPTIONS,
    NATIVE_LITERALS,
    NATIVE_SUPERSEDED,
    STATE,
)
from imagefs.image.vcpu import describe_vcpu
from imagefs.store.advance import Advance, essential_pages, is_small
from imagefs.store.catalogue import Catalogue
from imagefs.store.directory import DirectoryStore
from imagefs.store.indexing import Tree, build_trees
from imagefs.store.lock import SplitLock
from imagefs.store.packing import PackWriter
from imagefs.store.windows import encode_windows

WORKERS = 2
Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a split made; sizes in bytes."""

    manifest: bytes
    memory_size: int
    content_size: int
    """Of the memory's pages that are not zero."""
    stored_bytes: int
    """What fetching every chunk once for each reference takes: see Manifest."""
    new_bytes: int
    """What the store has grown by."""


def write_image(
    store: DirectoryStore,
    name: str,
    capture: Capture,
    *,
    chunk_pages: int = DEFAULT_CHUNK_PAGES,
    progress: Progress | None = None,
    lock: SplitLock | None = None,
) -> Written:
    """Write ``capture`` under ``name``, which may exist: it is moved to the new image as the very last step.

    ``lock`` is the caller's lock of the store, to be closed after this call, also if that fails; without one the store
    is locked for the time of the call. Raises the store's errors and whatever reading the capture's sources raises;
    nothing is left behind then.
    """
    if not 8 <= chunk_pages <= MAX_CHUNK_PAGES or chunk_pages % 8:
        raise UsageError(f"windows of {chunk_pages} pages: must be a multiple of 8 up to {MAX_CHUNK_PAGES}")
    with ExitStack() as stack:
        held = lock or stack.enter_context(SplitLock(store))
        catalogue = stack.enter_context(closing(Catalogue(store, held.settled)))
        packs = stack.enter_context(closing(PackWriter(store, catalogue)))
        pool = ThreadPoolExecutor(WORKERS, "imagefs-split")
        split = _Split(packs, pool, chunk_pages, progress)
        try:
            return split.write(store, name, capture)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            # An interrupt may come when the name is there already: too late to fail.
            if split.pointer is None or not _has_name(store, name, split.pointer):
                packs.undo(held)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _has_name(store: DirectoryStore, name: str, pointer: bytes) -> bool:
    """Whether the name is there with this content. If in doubt, yes: what it points at must not be deleted."""
    try:
        return store.get(name, limit=MAX_NAME_SIZE) == pointer
    except (MissingObjectError, CorruptObjectError):
        return False
    except StoreError:
        return True


class _Split:
    def __init__(
        self, packs: PackWriter, pool: ThreadPoolExecutor, chunk_pages: int, progress: Progress | None
    ) -> None:
        self._packs = packs
        self._pool = pool
        self._chunk_pages = chunk_pages
        self._progress = progress
        self._codec = Codec()
        self._advance = Advance()
        self._content_pages = 0
        self.pointer: bytes | None = None
        """The name's content, from the moment on that it may be in the store."""

    def write(self, store: DirectoryStore, name: str, capture: Capture) -> Written:
        with ExitStack() as stack:
            manifest = self._write_objects(store, capture, stack)
        encoded = manifest.encode()
        if len(encoded) > MAX_MANIFEST_SIZE:
            reason = f"{len(capture.config)} config files are too many: a manifest of {len(encoded)} bytes"
            raise UnsupportedInputError(reason, field="config")
        pointer = Name(self._packs.put_object(encoded), len(encoded))
        self._packs.rely()
        self.pointer = pointer.encode()
        store.put(name, self.pointer)
        self._packs.publish()
        return Written(
            pointer.manifest,
            capture.memory.size,
            self._content_pages * PAGE_SIZE,
            manifest.stored_bytes,
            self._packs.new_bytes,
        )

    def _write_objects(self, store: DirectoryStore, capture: Capture, stack: ExitStack) -> Manifest:
        """Everything but the manifest and the name."""
        sources = _sources(capture)
        total = sum(source.size for source in sources.values())
        done = 0
        trees = []
        stored = 0
        for stream, source in sources.items():
            tree = stack.enter_context(closing(Tree(source.size, self._chunk_pages, store.root)))
            self._write_stream(tree, stream, source, done, total)
            trees.append(tree)
            stored += tree.chunks.stored_bytes
            done += source.size
        names = list(sources)
        references = build_trees(
            trees, self._packs, lambda tree, level, name, data: self._advance.add_block(names[tree], level, name, data)
        )
        metadata = encode_metadata(
            self._codec,
            _document(capture),
            self._advance.first(),
            essential_pages(capture.memory, capture.essential),
            self._advance.rest(),
        )
        return Manifest(
            self._chunk_pages,
            dict(zip(names, references, strict=True)),
            self._packs.put_object(metadata),
            len(metadata),
            stored + sum(tree.index_bytes for tree in trees),
        )

    def _write_stream(self, tree: Tree, stream: str, source: ByteSource, done: int, total: int) -> None:
        advance = is_small(stream)

        def progress(offset: int) -> None:
            if self._progress is not None:
                self._progress(done + offset, total)

        # Payloads that travel with the metadata are wanted here even if the store has them already.
        known = _unknown if advance else self._packs.known
        for window in encode_windows(source, self._chunk_pages, self._codec, known, self._pool, progress):
            pages = window.pages.bit_count()
            ref = self._packs.known([window.digest]).get(window.digest) if advance else window.known
            if ref is not None:
                placed = self._packs.refer(ref)
            else:
                placed = self._packs.add(window.digest, window.payload, pages)
            if advance:
                self._advance.add_chunk(window.digest, window.payload)
            tree.chunks.add(window.number, window.digest, placed, window.pages)
            if stream == MEMORY:
                self._content_pages += pages


def _unknown(_: Sequence[bytes]) -> Mapping[bytes, PayloadRef]:
    return {}


def _sources(capture: Capture) -> dict[str, ByteSource]:
    native = capture.native
    for name in capture.config:
        if not is_file_name(name):
            raise UnsupportedInputError(f"{name!r} cannot be the name of a file", field="config")
    try:
        check_files(capture.native_files, native.size)
    except ValueError as error:
        raise UnsupportedInputError(str(error), field="native files") from error
    return {
        STATE: capture.state,
        **{CONFIG_PREFIX + name: BytesSource(data) for name, data in sorted(capture.config.items())},
        MEMORY: capture.memory,
        NATIVE_ENTRIES: native.entries,
        NATIVE_LITERALS: native.literals,
        NATIVE_EXCEPTIONS: native.exceptions,
        NATIVE_SUPERSEDED: native.superseded,
    }


def _document(capture: Capture) -> dict[str, Any]:
    """What the mount shows as metadata.json."""
    several = [{"path": file.path, "size": file.size} for file in capture.native_files]
    return {
        **({"native_files": several} if several else {}),
        "source": {"format": capture.source_format, "version": capture.source_version},
        "page_size": PAGE_SIZE,
        "memory_bytes": capture.memory.size,
        "native_bytes": capture.native.size,
        "state_bytes": capture.state.size,
        "regions": [
            {"name": r.name, "guest_address": r.guest_address, "size": r.size, "offset": r.offset}
            for r in capture.geometry.regions
        ],
        "config": sorted(capture.config),
        "restore": dict(capture.restore),
        "vcpus": [describe_vcpu(vcpu) for vcpu in capture.vcpus],
        "page_tables": [[kind.first, kind.count, kind.kind] for kind in capture.essential],
        **({"likely": [[run.start, len(run)] for run in capture.likely]} if capture.likely else {}),
    }
