"""``imagefs info STORE/NAME``."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

from imagefs.cli.opening import image_reader
from imagefs.cli.terminal import printable, size_text
from imagefs.errors import CorruptObjectError
from imagefs.image.capture import KERNEL_TEXT, PAGE_TABLE_KINDS
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.streams import MEMORY
from imagefs.store.reader import ImageReader
from imagefs.store.workingset import find_header

DESCRIPTION = """\
Show what is known about an image. Only its metadata is fetched: four requests, whatever
the size of its memory.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("image", metavar="STORE/NAME", help="a path or an http(s) URL")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    with image_reader(args.image) as reader:
        image = reader.image
        facts: dict[str, Any] = {
            **image.metadata.document,
            "image": image.digest.hex(),
            "chunk_pages": image.manifest.chunk_pages,
            "stored_bytes": image.manifest.stored_bytes,
            "metadata_bytes": image.manifest.metadata_size,
            "streams": {name: stream.size for name, stream in image.manifest.streams.items()},
        }
        facts["working_set"] = _working_set(reader)
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_lines(facts)))
    return 0


def _lines(facts: dict[str, Any]) -> list[str]:
    restore = facts["restore"]
    frames = Counter[str]()
    for _, count, kind in facts["page_tables"]:
        frames[kind] += count
    tables = sum(frames[kind] for kind in PAGE_TABLE_KINDS)
    rows = [
        ("image", facts["image"]),
        ("source", f"{facts['source']['format']} {facts['source']['version']}"),
        ("memory", size_text(facts["streams"][MEMORY])),
        ("to fetch", f"{size_text(facts['stored_bytes'])} for all of it"),
        ("metadata", f"{size_text(facts['metadata_bytes'])}, fetched at mount"),
        ("chunks", f"{facts['chunk_pages']} pages of {facts['page_size']} bytes"),
        ("state", size_text(facts["state_bytes"])),
        _native_row(facts),
        ("config", ", ".join(facts["config"]) or "none"),
        ("vCPUs", str(len(facts.get("vcpus", ()))) if facts.get("vcpus") else "not known"),
        ("page tables", f"{tables} frames" if tables else "not known"),
        ("kernel text", size_text(frames[KERNEL_TEXT] * PAGE_SIZE) if frames[KERNEL_TEXT] else "not known"),
        ("working set", _working_set_text(facts["working_set"])),
        ("restore", _restore_text(restore)),
    ]
    notes = restore.get("notes", [])
    rows += [("note", str(note)) for note in (notes if isinstance(notes, list) else [])]
    for r in facts["regions"]:
        place = f"at guest-physical {r['guest_address']:#x}, in memory at {r['offset']:#x}"
        rows.append(("region", f"{r['name']}: {size_text(r['size'])} {place}"))
    return [f"{label + ':':14}{printable(value)}" for label, value in rows]


def _native_row(facts: dict[str, Any]) -> tuple[str, str]:
    size = size_text(facts["native_bytes"])
    files = facts.get("native_files")
    return ("native files", f"{len(files)} files, {size}") if files else ("native file", size)


def _working_set(reader: ImageReader) -> dict[str, Any] | None:
    try:
        header = find_header(reader.store, reader.image)
    except CorruptObjectError as error:
        # A hint: an image is as good without it.
        return {"damaged": str(error)}
    return None if header is None else {"pages": header.pages, "bytes": header.size}


def _working_set_text(working_set: dict[str, Any] | None) -> str:
    if working_set is None:
        return "none published"
    if "damaged" in working_set:
        return f"damaged: {working_set['damaged']}"
    return f"{working_set['pages']} pages, {size_text(working_set['bytes'])}, fetched first"


def _restore_text(restore: dict[str, Any]) -> str:
    if not restore:
        return "not possible from this format: inspect only"
    machine = f", machine {restore['machine']}" if restore.get("machine") else ""
    return f"{restore.get('vmm', '?')}{machine}"
