"""The metadata document, which a mount shows as ``metadata.json``: what it must hold, checked once.

New fields are no new version, so what is not known is left alone; what is known must be right, because commands and
mounts use it without looking again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from imagefs.image.capture import PageKind
from imagefs.image.fields import Fields, is_integer
from imagefs.image.geometry import PAGE_SIZE, Geometry, Region
from imagefs.image.native_files import NativeFile, check_files
from imagefs.image.vcpu import VcpuState, parse_vcpus

_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)


@dataclass(frozen=True)
class Document:
    """``value`` is the JSON object as a whole; the rest is what was read out of it."""

    value: Mapping[str, Any]
    geometry: Geometry
    kinds: tuple[PageKind, ...]
    vcpus: tuple[VcpuState, ...]
    likely: tuple[range, ...]
    """Runs of pages that the guest will probably touch first, the most wanted first."""
    state_bytes: int
    native_bytes: int
    config: list[str]
    native_files: tuple[NativeFile, ...]
    """Empty where ``native`` is one file."""


def parse_document(text: bytes, *, key: str, origin: str) -> Document:
    """Raises CorruptObjectError, naming the field, for a document that lacks something or contradicts itself."""
    fields = Fields.parse(text, "document", key, origin)
    source = fields.mapping("source")
    source.text("format")
    source.text("version")
    if fields.integer("page_size") != PAGE_SIZE:
        raise fields.bad("page_size", f"only {PAGE_SIZE} is known")
    fields.mapping("restore")
    geometry = _geometry(fields)
    if fields.integer("memory_bytes") != geometry.size:
        raise fields.bad("memory_bytes", f"the regions have {geometry.size} bytes")
    return Document(
        fields.value,
        geometry,
        tuple(_kinds(fields, geometry.pages)),
        tuple(parse_vcpus(fields)),
        tuple(_likely(fields, geometry.pages)),
        fields.integer("state_bytes"),
        fields.integer("native_bytes"),
        _config(fields),
        _native_files(fields),
    )


def _geometry(fields: Fields) -> Geometry:
    regions = tuple(
        Region(r.text("name"), r.integer("guest_address"), r.integer("size"), r.integer("offset"))
        for r in fields.mappings("regions")
    )
    try:
        return Geometry(regions)
    except ValueError as error:
        raise fields.bad("regions", error) from error


def _kinds(fields: Fields, pages: int) -> Iterator[PageKind]:
    for item in fields.items("page_tables"):
        if not isinstance(item, list) or len(item) != 3 or not is_integer(item[0]) or not is_integer(item[1]):
            raise fields.bad("page_tables", "an item is not [page number, count, kind]")
        first, count, kind = item
        if not 0 < count <= pages - first:
            raise fields.bad("page_tables", f"{count} pages from {first} on are not in memory")
        if not isinstance(kind, str) or _KIND.fullmatch(kind) is None:
            raise fields.bad("page_tables", "a kind is not a word")
        yield PageKind(first, count, kind)


def _likely(fields: Fields, pages: int) -> Iterator[range]:
    for item in fields.items("likely") if "likely" in fields.value else ():
        if not isinstance(item, list) or len(item) != 2 or not all(is_integer(number) for number in item):
            raise fields.bad("likely", "an item is not [page number, count]")
        first, count = item
        if not 0 < count <= pages - first:
            raise fields.bad("likely", f"{count} pages from {first} on are not in memory")
        yield range(first, first + count)


def _config(fields: Fields) -> list[str]:
    names = fields.items("config")
    if not all(isinstance(name, str) for name in names) or any(a >= b for a, b in pairwise(names)):
        raise fields.bad("config", "not a sorted list of names")
    return names


def _native_files(fields: Fields) -> tuple[NativeFile, ...]:
    name = "native_files"
    if name not in fields.value:
        return ()
    files = tuple(NativeFile(f.text("path"), f.integer("size")) for f in fields.mappings(name))
    if not files:
        raise fields.bad(name, "an empty list says nothing: left out where the native file is one")
    try:
        check_files(files, fields.integer("native_bytes"))
    except ValueError as error:
        raise fields.bad(name, error) from error
    return files
