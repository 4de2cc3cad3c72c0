"""The worked example of docs/format.md: made, shown, and read back from the page.

``python -m tests.unit.format_example`` writes it anew into the page.
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import zstandard

from imagefs.image import chunks
from imagefs.image.capture import BytesSource, Capture
from imagefs.image.native import NativeTemplate, TemplateBuilder
from imagefs.store.directory import DirectoryStore
from imagefs.store.writer import Written, write_image
from tests.unit.captures import capture_of

FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "format.md"
BEGIN = "<!-- example: made by `python -m tests.unit.format_example` -->\n"
END = "<!-- end of example -->\n"
NAME = "vm"

STATE = b"device state\n"
MEMORY = b"imagefs!" * 512 + bytes(4096) + bytes(range(256)) * 16
NATIVE = b"SAVED\n" + MEMORY

TABLE_ENTRY = struct.Struct("<32sIII")


def example() -> Capture:
    entries, literals = bytearray(), bytearray()
    builder = TemplateBuilder(entries.extend, literals.extend)
    builder.literal(b"SAVED\n")
    builder.pages(0, 3)
    builder.finish()
    none = BytesSource(b"")
    template = NativeTemplate(builder.size, BytesSource(bytes(entries)), BytesSource(bytes(literals)), none, none)
    return replace(capture_of(MEMORY, state=STATE), source_format="example", native=template)


def write(root: Path, capture: Capture, chunk_pages: int = 8) -> Written:
    return write_image(DirectoryStore(root, create=True), NAME, capture, chunk_pages=chunk_pages)


def files(root: Path) -> dict[str, bytes]:
    """Everything in a store by key, but for what readers never look at."""
    store = DirectoryStore(root)
    return {key: store.get(key) for key in store.keys()}  # noqa: SIM118 - a store is no mapping


def object_key(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}"


# --- into the page


def render(root: Path) -> str:
    """The store's objects as the page shows them, in the order in which a reader meets them."""
    found = files(root)
    name = found.pop(NAME)
    top = object_key(json.loads(name)["manifest"])
    manifest = found.pop(top)
    meta = object_key(json.loads(manifest)["metadata"]["object"])
    metadata = found.pop(meta)
    out = [
        _text(f"`{NAME}`, the name", name),
        _text(f"`{top}`, the manifest", manifest),
        _binary(f"`{meta}`, the metadata object", _of_metadata(metadata)),
        _text("Its document", _document(metadata)),
    ]
    # The packs that others refer to come first.
    for key in sorted(found, key=lambda key: len(found[key])):
        out.append(_binary(f"`{key}`, a pack", _of_pack(found[key])))
    return "\n" + "\n".join(out) + "\n"


def _text(title: str, data: bytes) -> str:
    return f"{title}, {len(data)} bytes, text:\n\n    {data.decode()}"


def _binary(title: str, pieces: Iterator[tuple[bytes, str]], width: int = 24) -> str:
    lines, offset = [], 0
    for data, label in pieces:
        for at in range(0, len(data), width):
            row = data[at : at + width].hex(" ", -4)
            lines.append(f"    {offset + at:4}  {row:53}  {label if at == 0 else ''}".rstrip())
        offset += len(data)
    return f"{title}, {offset} bytes:\n\n" + "\n".join(lines) + "\n"


def _document(metadata: bytes) -> bytes:
    (length,) = struct.unpack_from("<I", metadata, 8)
    return zstandard.ZstdDecompressor().decompress(metadata[12 : 12 + length])


def _of_metadata(data: bytes) -> Iterator[tuple[bytes, str]]:
    (length,) = struct.unpack_from("<I", data, 8)
    at = 12 + length
    (count,) = struct.unpack_from("<I", data, at)
    yield data[:8], "magic"
    yield data[8:12], f"document length {length}"
    yield data[12:at], "document, a frame"
    yield data[at : at + 4], f"parts {count}"
    at += 4
    for _ in range(count):
        (length,) = struct.unpack_from("<I", data, at + 32)
        yield data[at : at + 32], "part: digest"
        yield data[at + 32 : at + 36], f"length {length}"
        yield data[at + 36 : at + 36 + length], "payload, as in its pack"
        at += 36 + length
    yield data[at:], "runs 0"


def _of_pack(data: bytes) -> Iterator[tuple[bytes, str]]:
    toc, count = struct.unpack_from("<II", data, len(data) - 16)
    table = [TABLE_ENTRY.unpack_from(data, at) for at in range(toc, len(data) - 16, TABLE_ENTRY.size)]
    yield data[:8], "magic"
    for _, offset, length, pages in table:
        payload = data[offset : offset + length]
        yield from [(payload, f"chunk, a frame of {4096 * pages} bytes")] if pages else _of_block(payload)
    for digest, offset, length, pages in table:
        yield digest, "table: digest"
        yield struct.pack("<III", offset, length, pages), f"offset {offset}, length {length}, pages {pages}"
    yield data[-16:-12], f"toc {toc}"
    yield data[-12:-8], f"n {count}"
    yield data[-8:], "end magic"


def _of_block(data: bytes) -> Iterator[tuple[bytes, str]]:
    """A leaf with one pack in its table."""
    level, chunk_pages, slots, packs, entries = struct.unpack_from("<xxxxxBHHHH", data)
    yield data[:6], f"index block: magic, version, level {level}"
    yield data[6:16], f"chunk_pages {chunk_pages}, slots {slots}, packs {packs}, entries {entries}, reserved"
    yield data[16:80], "present"
    yield data[80:112], "pack table"
    for at in range(112, len(data), 42 + chunk_pages // 8):
        offset, length, pack = struct.unpack_from("<IIH", data, at + 32)
        yield data[at : at + 32], "entry: digest"
        yield data[at + 32 : at + 42], f"offset {offset}, length {length}, pack {pack}"
        yield data[at + 42 : at + 42 + chunk_pages // 8], "pages"


# --- out of the page


def shown() -> str:
    """The example as the page has it."""
    return FORMAT_PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


def objects_shown() -> dict[str, bytes]:
    """The objects of the example by key: a text as it stands, a dump by its hexadecimal column only."""
    found: dict[str, bytes] = {}
    key, text = "", False
    for line in shown().splitlines():
        if heading := re.fullmatch(r"`([^`]+)`, .* bytes(, text)?:", line):
            key, text = heading[1], heading[2] is not None
            found[key] = b""
        elif not line.startswith(" "):
            key = key if not line else ""
        elif key and text:
            found[key] += line.strip().encode() + b"\n"
        elif key:
            row = re.fullmatch(r" +(\d+)  ((?:[0-9a-f]{2,8} ?)+)(?:  .*)?", line)
            assert row is not None, line
            assert int(row[1]) == len(found[key]), line
            found[key] += bytes.fromhex(row[2])
    return found


def frames_shown() -> dict[bytes, bytes]:
    """The frames of the example, by what they hold."""
    found = {}
    for data in objects_shown().values():
        for match in re.finditer(re.escape(b"\x28\xb5\x2f\xfd"), data):
            frame = zstandard.ZstdDecompressor().decompressobj()
            content = frame.decompress(data[match.start() :])
            found[content] = data[match.start() : len(data) - len(frame.unused_data)]
    return found


class FramesShown(chunks.Codec):
    """Makes the page's frames: what a compressor makes of a content is no part of the format."""

    def compress(self, content: chunks.Buffer) -> bytes:
        return frames_shown()[bytes(content)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "s"
        write(root, example())
        before, _, rest = FORMAT_PAGE.read_text().partition(BEGIN)
        FORMAT_PAGE.write_text(before + BEGIN + render(root) + END + rest.partition(END)[2])
