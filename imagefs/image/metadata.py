"""The metadata object: all that a mount needs before the first page, in one request.

It holds the JSON document that the mount shows as ``metadata.json``; the first index blocks and the chunks of small
streams (device state, config), which a reader takes from here instead of from packs; and the essential pages: the
guest's page tables, which are in its way first. What does not fit into TARGET_SIZE stays in the packs alone, so the
object is an advance payment, never the only copy, and a mount costs the same for 1 TiB as for 1 GiB.

| bytes | field    | meaning                                                                      |
|------:|----------|------------------------------------------------------------------------------|
|     8 | magic    | ``IFSMETA1``                                                                 |
|     4 | json     | bytes of the next field                                                      |
|     … | document | zstd frame of the canonical JSON                                             |
|     4 | parts    | number of parts; each: digest 32, length u32, then the payload as in a pack   |
|     4 | runs     | number of page runs; each: page u64, count u32, length u32, then a zstd frame of the pages |

All little-endian, nothing behind the last run. The object is verified as a whole by its digest in the manifest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from imagefs.errors import CorruptObjectError, UnsupportedInputError
from imagefs.image.capture import PageKind
from imagefs.image.chunks import Codec
from imagefs.image.document import Document, parse_document
from imagefs.image.fields import canonical_json
from imagefs.image.geometry import PAGE_SIZE, Geometry

MAGIC = b"IFSMETA1"
PART = struct.Struct("<32sI")
RUN = struct.Struct("<QII")
U32 = struct.Struct("<I")
MAX_DOCUMENT_SIZE = 4 << 20
MAX_RUN_PAGES = 256
MAX_PAGES = 4096
"""Pages in all runs together: 16 MiB, so that an object that compresses too well cannot fill a reader's memory."""
TARGET_SIZE = 768 << 10
"""What a writer fills: with the name and the manifest a mount stays below 1 MiB."""

Parts = Iterable[tuple[bytes, bytes]]
"""Digest and payload of each."""
PageRuns = Iterable[tuple[int, bytes]]
"""First page number and bytes of each run."""


@dataclass(frozen=True)
class Metadata:
    """The parsed object. ``parts`` by digest; ``pages`` are ``(first page number, bytes)`` runs."""

    checked: Document
    parts: Mapping[bytes, bytes]
    pages: tuple[tuple[int, bytes], ...]

    @property
    def document(self) -> Mapping[str, Any]:
        """What ``metadata.json`` shows."""
        return self.checked.value

    @property
    def geometry(self) -> Geometry:
        """The memory's layout."""
        return self.checked.geometry

    @property
    def kinds(self) -> tuple[PageKind, ...]:
        """The page-table frames."""
        return self.checked.kinds


def encode_metadata(
    codec: Codec, document: Mapping[str, Any], parts: Parts, pages: PageRuns, more: Parts = (), limit: int = TARGET_SIZE
) -> bytes:
    """The object's bytes: as much as ``limit`` allows, first of ``parts``, then of ``pages``, then of ``more`` parts.

    A part that does not fit is left out and smaller ones behind it may still go in. Of the pages those from some page
    on are left out: none are taken from the iterable, and none compressed, once the room is used up.

    Raises UnsupportedInputError for a document that is too large, or that JSON cannot express.
    """
    room = _Room(limit - len(MAGIC) - 3 * U32.size)
    text = _encode_document(codec, document, room)
    encoded: dict[bytes, bytes] = {}
    _add_parts(encoded, parts, room)
    runs = _encode_runs(codec, pages, room)
    _add_parts(encoded, more, room)
    counts = U32.pack(len(encoded)), U32.pack(len(runs))
    return b"".join([MAGIC, U32.pack(len(text)), text, counts[0], *encoded.values(), counts[1], *runs])


@dataclass
class _Room:
    """Bytes that are left."""

    left: int

    def take(self, size: int) -> bool:
        if size > self.left:
            return False
        self.left -= size
        return True


def _encode_document(codec: Codec, document: Mapping[str, Any], room: _Room) -> bytes:
    try:
        plain = canonical_json(document)
    except (ValueError, RecursionError) as error:
        raise UnsupportedInputError(f"what is known about the VM cannot be written as JSON: {error}") from error
    if len(plain) > MAX_DOCUMENT_SIZE:
        raise UnsupportedInputError(f"what is known about the VM takes {len(plain)} bytes, over {MAX_DOCUMENT_SIZE}")
    text = codec.compress(plain)
    if not room.take(len(text)):
        raise UnsupportedInputError(f"what is known about the VM takes {len(text)} bytes compressed, over {room.left}")
    return text


def _add_parts(encoded: dict[bytes, bytes], parts: Parts, room: _Room) -> None:
    for name, payload in parts:
        if name not in encoded and room.take(PART.size + len(payload)):
            encoded[name] = PART.pack(name, len(payload)) + payload


def _encode_runs(codec: Codec, pages: PageRuns, room: _Room) -> list[bytes]:
    """A run that does not fit is halved until its first part does."""
    runs: list[bytes] = []
    total = 0
    for first, data in pages:
        rest = [(first, data)]
        while rest:
            page, run = rest.pop()
            count = len(run) // PAGE_SIZE
            payload = codec.compress(run) if total + count <= MAX_PAGES else b""
            if payload and room.take(RUN.size + len(payload)):
                runs.append(RUN.pack(page, count, len(payload)) + payload)
                total += count
            elif count > 1:
                half = count // 2
                rest += [(page + half, run[half * PAGE_SIZE :]), (page, run[: half * PAGE_SIZE])]
            else:
                return runs
    return runs


def decode_metadata(codec: Codec, data: bytes, *, key: str, origin: str) -> Metadata:
    """Parse an object that was verified by its digest. CorruptObjectError names the field that is wrong."""
    at = 0

    def take(count: int, name: str) -> bytes:
        nonlocal at
        if len(data) - at < count:
            raise CorruptObjectError(f"metadata: {name} at {at:#x} is cut short", key=key, origin=origin)
        at += count
        return data[at - count : at]

    def number(name: str) -> int:
        value: int = U32.unpack(take(U32.size, name))[0]
        return value

    def bad(name: str) -> CorruptObjectError:
        return CorruptObjectError(f"metadata: bad {name} before {at:#x}", key=key, origin=origin)

    if take(len(MAGIC), "magic") != MAGIC:
        raise bad("magic")
    frame = take(number("document length"), "document")
    try:
        text = codec.decompress_bounded(frame, MAX_DOCUMENT_SIZE)
    except ValueError as error:
        raise bad("document") from error
    document = parse_document(text, key=key, origin=origin)
    parts: dict[bytes, bytes] = {}
    for _ in range(number("parts")):
        name, length = PART.unpack(take(PART.size, "part"))
        parts[name] = take(length, "part payload")
    pages: list[tuple[int, bytes]] = []
    total = 0
    for _ in range(number("runs")):
        page, count, length = RUN.unpack(take(RUN.size, "page run"))
        payload = take(length, "page run payload")
        total += count
        if not 0 < count <= MAX_RUN_PAGES or total > MAX_PAGES:
            raise bad("page run count")
        if page + count > document.geometry.pages:
            raise bad("page run: beyond the memory")
        try:
            pages.append((page, codec.decompress(payload, count * PAGE_SIZE)))
        except ValueError as error:
            raise bad("page run") from error
    if at != len(data):
        raise bad("end: bytes are left over")
    return Metadata(document, parts, tuple(pages))
