"""CRIU's pagemap images: which pages of a process are in which file.

Sources: CRIU's ``images/pagemap.proto``, ``criu/include/magic.h``, ``criu/pagemap.c`` and ``criu/include/pagemap.h``.
Little-endian:

| bytes | field     | meaning                                                                              |
|------:|-----------|--------------------------------------------------------------------------------------|
|     4 | magic     | 0x54564319 in images of version 1.1; those of version 1.0 begin with the next field   |
|     4 | magic     | 0x56084025                                                                           |
|     4 | size      | bytes of the message that follows                                                    |
|     … | head      | ``pagemap_head``                                                                     |
|       | entries   | each: size u32 and ``pagemap_entry``, to the end of the file                          |

| message       | number | field                 | meaning                                             |
|---------------|-------:|-----------------------|-----------------------------------------------------|
| pagemap_head  |      1 | pages_id u32          | the pages are in ``pages-ID.img``                   |
| pagemap_entry |      1 | vaddr u64             | address of the first page in the process            |
|               |      2 | compat_nr_pages u32   | how many pages                                      |
|               |      3 | in_parent bool        | older: the pages are in the parent's images         |
|               |      4 | flags u32             | newer, bits: 1 in the parent's images, 2 may come   |
|               |        |                       | lazily, 4 in ``pages-ID.img``                       |
|               |      5 | nr_pages u64          | newest: how many pages                              |

An entry without flags and not in the parent has its pages in the file. Entries ascend; those in the file have their
pages there one after the other. What is neither in the file nor in the parent was left behind (``criu dump
--lazy-pages``).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from imagefs.errors import UnsupportedInputError
from imagefs.image.geometry import PAGE_SIZE

COMMON_MAGIC, PAGEMAP_MAGIC = 0x54564319, 0x56084025
IN_PARENT, LAZY, PRESENT = 1, 2, 4
MAX_PAGEMAP = 8 << 20
"""Bytes: half a million entries."""
MAX_MESSAGE = 4096
MAX_ADDRESS = 1 << 57
"""User space with five levels of page tables ends at half of this."""

_U32 = struct.Struct("<I")


def _messages() -> tuple[type[Message], type[Message]]:
    """Classes of the two messages, described here because pip packages of CRIU have no such description."""
    kinds = descriptor_pb2.FieldDescriptorProto
    schema = descriptor_pb2.FileDescriptorProto(
        name="imagefs/criu_pagemap.proto", package="imagefs.criu", syntax="proto2"
    )
    fields: dict[str, list[tuple[str, int, Any, Any]]] = {
        "pagemap_head": [("pages_id", 1, kinds.TYPE_UINT32, kinds.LABEL_REQUIRED)],
        "pagemap_entry": [
            ("vaddr", 1, kinds.TYPE_UINT64, kinds.LABEL_REQUIRED),
            ("compat_nr_pages", 2, kinds.TYPE_UINT32, kinds.LABEL_REQUIRED),
            ("in_parent", 3, kinds.TYPE_BOOL, kinds.LABEL_OPTIONAL),
            ("flags", 4, kinds.TYPE_UINT32, kinds.LABEL_OPTIONAL),
            ("nr_pages", 5, kinds.TYPE_UINT64, kinds.LABEL_OPTIONAL),
        ],
    }
    for message, described in fields.items():
        added = schema.message_type.add(name=message)
        for name, number, kind, label in described:
            added.field.add(name=name, number=number, type=kind, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(schema)
    head, entry = (pool.FindMessageTypeByName(f"imagefs.criu.{message}") for message in fields)
    return message_factory.GetMessageClass(head), message_factory.GetMessageClass(entry)


PagemapHead, PagemapEntry = _messages()


@dataclass
class Pagemap:
    """Entries in columns, one row an entry; 29 bytes each."""

    pages_id: int
    addresses: array[int] = field(default_factory=lambda: array("Q"))
    counts: array[int] = field(default_factory=lambda: array("Q"))
    places: array[int] = field(default_factory=lambda: array("Q"))
    """Byte offset in the pages file, for entries whose pages are there."""
    flags: array[int] = field(default_factory=lambda: array("B"))
    file_pages: int = 0
    """Pages that the pages file must have."""


def is_pagemap(head: bytes) -> bool:
    """From a file's first 8 bytes."""
    return head[:4] == _U32.pack(PAGEMAP_MAGIC) or head[:8] == _U32.pack(COMMON_MAGIC) + _U32.pack(PAGEMAP_MAGIC)


def parse_pagemap(data: bytes, name: str) -> Pagemap:
    """UnsupportedInputError, naming the file, with field and offset."""
    if not is_pagemap(data):
        raise _error(f"{data[:8].hex()} is no pagemap's", name, "magic", 0)
    at = 4 if data[:4] == _U32.pack(PAGEMAP_MAGIC) else 8
    messages = _split(data, at, name)
    at, payload = next(messages, (len(data), b""))
    if not payload:
        raise _error("there is none", name, "pagemap_head", at)
    pagemap = Pagemap(_decoded(PagemapHead, payload, name, at).pages_id)
    end = 0
    for at, payload in messages:
        entry = _decoded(PagemapEntry, payload, name, at)
        count = entry.nr_pages if entry.HasField("nr_pages") else entry.compat_nr_pages
        flags = entry.flags
        if entry.in_parent:
            flags |= IN_PARENT
        elif not entry.HasField("flags"):
            flags = PRESENT
        if entry.vaddr % PAGE_SIZE or entry.vaddr < end:
            reason = "not behind the entry before" if entry.vaddr < end else f"no multiple of {PAGE_SIZE}"
            raise _error(f"{entry.vaddr:#x} is {reason}", name, "vaddr", at)
        if not count or count > (MAX_ADDRESS - entry.vaddr) // PAGE_SIZE:
            raise _error(f"{count} pages from {entry.vaddr:#x} on", name, "nr_pages", at)
        if flags & ~(IN_PARENT | LAZY | PRESENT):
            raise _error(f"{flags:#x} has bits that are not understood", name, "flags", at)
        end = entry.vaddr + count * PAGE_SIZE
        pagemap.addresses.append(entry.vaddr)
        pagemap.counts.append(count)
        pagemap.places.append(pagemap.file_pages * PAGE_SIZE)
        pagemap.flags.append(flags)
        if flags & PRESENT:
            pagemap.file_pages += count
    return pagemap


def _split(data: bytes, at: int, name: str) -> Iterator[tuple[int, bytes]]:
    """Where each message begins, and its bytes."""
    while at < len(data):
        if len(data) - at < _U32.size:
            raise _error("the file ends within a size", name, "size", at)
        (size,) = _U32.unpack_from(data, at)
        if not 0 < size <= MAX_MESSAGE or size > len(data) - at - _U32.size:
            raise _error(f"{size} bytes, the file has {len(data) - at - _U32.size} more", name, "size", at)
        yield at + _U32.size, data[at + _U32.size : at + _U32.size + size]
        at += _U32.size + size


def _decoded(kind: type[Message], payload: bytes, name: str, at: int) -> Any:
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        raise _error("no such message", name, kind.DESCRIPTOR.name, at) from error


def _error(reason: str, name: str, what: str, offset: int) -> UnsupportedInputError:
    return UnsupportedInputError(reason, field=f"{name}: {what}", offset=offset)
