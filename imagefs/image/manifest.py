"""The manifest, by whose digest an image is named, and the name that points at it.

Both are JSON in one canonical form (UTF-8, keys sorted, no white space, one newline at the end), so that the same
image always has the same digest. Both are closed: a field that version 1 does not have makes them unreadable, because
whoever adds one means something by it that this reader would get wrong. See docs/format.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imagefs.errors import CorruptObjectError
from imagefs.image.chunks import MAX_CHUNK_PAGES, digest
from imagefs.image.fields import Fields, canonical_json
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.index import MAX_BLOCK_SIZE, BlockRef, PayloadRef, StreamRef, root_level
from imagefs.image.native import ENTRY_SIZE, EXCEPTION_SIZE
from imagefs.image.native_files import is_file_name
from imagefs.image.packs import MAX_PACK_SIZE
from imagefs.image.streams import (
    CONFIG_PREFIX,
    MEMORY,
    NATIVE_ENTRIES,
    NATIVE_EXCEPTIONS,
    NATIVE_SUPERSEDED,
    REQUIRED,
)

VERSION = 1
MAX_MANIFEST_SIZE = 1 << 20
MAX_NAME_SIZE = 4096
MAX_METADATA_SIZE = 1 << 20
"""Bytes of the name of a file below ``config/``: what Linux allows."""


@dataclass(frozen=True)
class Manifest:
    """What an image consists of."""

    chunk_pages: int
    streams: Mapping[str, StreamRef]
    metadata: bytes
    """Digest of the metadata object."""
    metadata_size: int
    stored_bytes: int
    """Bytes of the payloads of all index blocks and chunks, each counted as often as an entry or a root refers to it:
    what fetching all of the image takes without a cache of what came before. For people; nothing relies on it."""

    @property
    def window_size(self) -> int:
        """Bytes of a window."""
        return self.chunk_pages * PAGE_SIZE

    @property
    def config(self) -> list[str]:
        """The names of the files below ``config/``, sorted."""
        return sorted(name.removeprefix(CONFIG_PREFIX) for name in self.streams if name.startswith(CONFIG_PREFIX))

    def encode(self) -> bytes:
        return canonical_json(
            {
                "imagefs": VERSION,
                "page_size": PAGE_SIZE,
                "chunk_pages": self.chunk_pages,
                "streams": {name: _encode_stream(stream) for name, stream in self.streams.items()},
                "metadata": {"object": self.metadata.hex(), "size": self.metadata_size},
                "stored_bytes": self.stored_bytes,
            }
        )

    @classmethod
    def decode(cls, data: bytes, *, key: str, origin: str) -> Manifest:
        """Raises CorruptObjectError, naming the field, for anything that :meth:`encode` does not produce."""
        fields = Fields.parse(data, "manifest", key, origin)
        _check_version(fields)
        if fields.integer("page_size") != PAGE_SIZE:
            raise fields.bad("page_size", f"only {PAGE_SIZE} is known")
        chunk_pages = fields.integer("chunk_pages")
        if not 8 <= chunk_pages <= MAX_CHUNK_PAGES or chunk_pages % 8:
            raise fields.bad("chunk_pages", f"{chunk_pages} is not a multiple of 8 up to {MAX_CHUNK_PAGES}")
        metadata = fields.mapping("metadata")
        manifest = cls(
            chunk_pages,
            _decode_streams(fields.mapping("streams"), chunk_pages),
            metadata.digest("object"),
            metadata.integer("size", MAX_METADATA_SIZE),
            fields.integer("stored_bytes"),
        )
        if manifest.encode() != data:
            raise _not_canonical("manifest", key, origin)
        return manifest


@dataclass(frozen=True, slots=True)
class Name:
    """The content of STORE/NAME: which manifest the name means now."""

    manifest: bytes
    size: int
    """Bytes of the manifest, so that a reader knows how much to expect."""

    def encode(self) -> bytes:
        return canonical_json({"imagefs": VERSION, "manifest": self.manifest.hex(), "size": self.size})

    @classmethod
    def decode(cls, data: bytes, *, key: str, origin: str) -> Name:
        """Raises CorruptObjectError; also where something other than an image has that name."""
        fields = Fields.parse(data, "image name", key, origin)
        _check_version(fields)
        name = cls(fields.digest("manifest"), fields.integer("size", MAX_MANIFEST_SIZE))
        if name.encode() != data:
            raise _not_canonical("image name", key, origin)
        return name


def _check_version(fields: Fields) -> None:
    version = fields.integer("imagefs")
    if version != VERSION:
        raise fields.bad("imagefs", f"format version {version}; this program reads {VERSION}")


def _not_canonical(what: str, key: str, origin: str) -> CorruptObjectError:
    reason = f"{what}: not in canonical form, or with a field that format version {VERSION} does not have"
    return CorruptObjectError(reason, key=key, origin=origin)


def _encode_stream(stream: StreamRef) -> dict[str, Any]:
    root = stream.root
    if root is None:
        return {"size": stream.size, "root": None}
    place = root.place
    return {
        "size": stream.size,
        "root": {"digest": root.digest.hex(), "pack": place.pack.hex(), "offset": place.offset, "length": place.length},
    }


def _decode_streams(fields: Fields, chunk_pages: int) -> dict[str, StreamRef]:
    for name in REQUIRED:
        if name not in fields.value:
            raise fields.bad(name, "this stream is missing")
    for name in fields.value:
        if name.startswith(CONFIG_PREFIX) and not is_file_name(name.removeprefix(CONFIG_PREFIX)):
            raise fields.bad(repr(name), "not a file's name")
    streams = {name: _decode_stream(fields.mapping(name), chunk_pages) for name in fields.value}
    for name, unit in ((MEMORY, PAGE_SIZE), (NATIVE_ENTRIES, ENTRY_SIZE), (NATIVE_EXCEPTIONS, EXCEPTION_SIZE)):
        if streams[name].size % unit:
            raise fields.bad(name, f"{streams[name].size} bytes are not a multiple of {unit}")
    if streams[NATIVE_SUPERSEDED].size != streams[NATIVE_EXCEPTIONS].size // EXCEPTION_SIZE * PAGE_SIZE:
        raise fields.bad(NATIVE_SUPERSEDED, "not one page for each exception")
    return streams


def _decode_stream(fields: Fields, chunk_pages: int) -> StreamRef:
    size = fields.integer("size")
    if "root" in fields.value and fields.value["root"] is None:
        return StreamRef(size, None)
    windows = StreamRef(size, None).windows(chunk_pages)
    if not windows:
        raise fields.bad("root", "an empty stream has none")
    root = fields.mapping("root")
    place = PayloadRef(root.digest("pack"), root.integer("offset", MAX_PACK_SIZE), root.integer("length"))
    if not 0 < place.length <= MAX_BLOCK_SIZE:
        raise root.bad("length", f"{place.length} bytes are no index block")
    return StreamRef(size, BlockRef(root.digest("digest"), place, root_level(windows), windows))


def object_digest_ok(data: bytes, want: bytes) -> bool:
    """Whether an object's bytes are those that its name promises."""
    return digest(data) == want
