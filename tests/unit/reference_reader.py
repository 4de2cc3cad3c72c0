"""A second reader of split images, written from docs/format.md alone: it proves that the page suffices.

Simple, slow, of directories only. It uses nothing of imagefs, on purpose: what it reads is what the page says. Names of
sections in comments are those of the page.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3

PAGE = 4096
FANOUT = 512
NAME_LIMIT = 4096
OBJECT_LIMIT = 1 << 20
DOCUMENT_LIMIT = 4 << 20
PAYLOAD_LIMIT = (4 << 20) + (64 << 10)
BLOCK_LIMIT = 103_504
PACK_LIMIT = 40 << 20
RUN_PAGES = 256
ALL_RUN_PAGES = 4096
LITERAL_LIMIT, PREFIX_LIMIT = 1 << 30, 1 << 16
STREAMS = ("memory", "state", "native-entries", "native-literals", "native-exceptions", "native-superseded")
LITERAL, PAGES, BARE = 0, 1, 2


class Refused(Exception):  # noqa: N818 - not an error of this program
    """The image is damaged, or no image."""


def need(truth: bool, what: str) -> None:
    if not truth:
        raise Refused(what)


def hash_of(data: bytes) -> bytes:
    return blake3(data).digest()


def bits_of(bitmap: bytes) -> list[int]:
    return [i for i in range(8 * len(bitmap)) if bitmap[i // 8] >> i % 8 & 1]


def unframed(frame: bytes, limit: int, exact: bool = True) -> bytes:
    """The content of a frame: of exactly ``limit`` bytes, or of at most so many."""
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        need(size == limit if exact else size <= limit, f"frame: content size {size}, wanted {limit}")
        content: bytes = zstandard.ZstdDecompressor().decompress(frame, max_output_size=max(size, 1))
    except zstandard.ZstdError as error:
        raise Refused(f"frame: {error}") from error
    need(len(content) == size, "frame: shorter than its header says")
    return content


def no_number(name: str) -> None:
    raise ValueError(name)


def json_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=no_number)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what}: {error}") from error
    need(isinstance(value, dict), f"{what}: not an object")
    found: dict[str, Any] = value
    return found


def closed_object(data: bytes, what: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Canonical JSON with these fields and no others; ``shape`` has a type for each, or a shape."""
    found = json_object(data, what)
    canonical = json.dumps(found, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    need(canonical.encode("utf-8") + b"\n" == data, f"{what}: not canonical")
    need_shape(found, what, shape)
    return found


def need_shape(value: Any, what: str, shape: Any) -> None:
    if isinstance(shape, dict):
        need(isinstance(value, dict) and set(value) == set(shape), f"{what}: fields")
        for name, inner in shape.items():
            need_shape(value[name], f"{what}: {name}", inner)
    elif shape is int:
        integer(value, what)
    elif shape is bytes:
        digest_in(value, what)
    else:
        need(isinstance(value, shape), what)


def integer(value: Any, what: str, limit: int = 2**63 - 1) -> int:
    need(type(value) is int and 0 <= value <= limit, f"{what}: {value!r}")
    return int(value)


def digest_in(value: Any, what: str) -> bytes:
    need(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None, f"{what}: {value!r}")
    return bytes.fromhex(value)


class Taker:
    """Takes fields off the front of bytes, never more than are there."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def take(self, count: int) -> bytes:
        need(count <= len(self.rest), "cut short")
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def fields(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))


class ReferenceReader:
    """One image of a directory store. Raises :class:`Refused`, or OSError where a file cannot be read."""

    def __init__(self, store: Path, name: str) -> None:
        self.store = store
        # Name
        need(re.fullmatch(r"(?!.*\.\.)[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}", name) is not None, f"name: {name!r}")
        need(name not in ("objects", "working-sets"), f"name: {name}")
        data = (store / name).read_bytes()
        need(len(data) <= NAME_LIMIT, "name: too long")
        pointer = closed_object(data, "name", {"imagefs": int, "manifest": bytes, "size": int})
        need(pointer["imagefs"] == 1, f"name: version {pointer['imagefs']}")
        # Manifest
        self.identity = digest_in(pointer["manifest"], "name: manifest")
        shape: dict[str, Any] = {
            "imagefs": int,
            "page_size": int,
            "chunk_pages": int,
            "streams": dict,
            "stored_bytes": int,
        }
        shape["metadata"] = {"object": bytes, "size": int}
        manifest = self.get_object(self.identity, integer(pointer["size"], "name: size", OBJECT_LIMIT))
        self.manifest = closed_object(manifest, "manifest", shape)
        need(self.manifest["imagefs"] == 1, f"manifest: version {self.manifest['imagefs']}")
        need(self.manifest["page_size"] == PAGE, "manifest: page_size")
        self.chunk_pages = integer(self.manifest["chunk_pages"], "manifest: chunk_pages", 1024)
        need(self.chunk_pages >= 8 and self.chunk_pages % 8 == 0, "manifest: chunk_pages")
        self.window = PAGE * self.chunk_pages
        self.streams: dict[str, Any] = self.manifest["streams"]
        self.check_streams()
        # Metadata object
        size = integer(self.manifest["metadata"]["size"], "manifest: metadata.size", OBJECT_LIMIT)
        self.parts: dict[bytes, bytes] = {}
        self.runs: list[tuple[int, bytes]] = []
        metadata = digest_in(self.manifest["metadata"]["object"], "manifest: metadata.object")
        self.document = self.read_metadata(self.get_object(metadata, size))
        self.memory_size = integer(self.streams["memory"]["size"], "memory: size")
        self.check_document()

    def check_streams(self) -> None:
        need(set(STREAMS) <= set(self.streams), "manifest: a stream is missing")
        for name, fields in self.streams.items():
            if name.startswith("config/"):
                file = name.removeprefix("config/")
                need(
                    re.fullmatch(r"[^/\0]+", file) is not None and file not in (".", ".."),
                    f"{name!r}: not a file's name",
                )
                need(len(file.encode("utf-8")) <= 255, f"{name!r}: too long")
            if isinstance(fields, dict) and fields.get("root") is not None:
                root = {"digest": bytes, "pack": bytes, "offset": int, "length": int}
                need_shape(fields, name, {"size": int, "root": root})
                need(fields["size"] > 0, f"{name}: root of nothing")
                need(fields["root"]["offset"] <= PACK_LIMIT, f"{name}: root: offset")
                need(0 < fields["root"]["length"] <= BLOCK_LIMIT, f"{name}: root: length")
            else:
                need_shape(fields, name, {"size": int, "root": type(None)})
        need(self.size("memory") % PAGE == 0, "memory: not of whole pages")
        need(self.size("native-entries") % 40 == self.size("native-exceptions") % 8 == 0, "native tables: size")
        need(self.size("native-superseded") == self.size("native-exceptions") // 8 * PAGE, "native-superseded: size")

    # --- Store

    def path(self, digest: bytes) -> Path:
        return self.store / "objects" / digest.hex()[:2] / digest.hex()

    def get_object(self, digest: bytes, size: int) -> bytes:
        with self.path(digest).open("rb") as file:
            data = file.read(size + 1)
        need(len(data) == size, f"{digest.hex()}: not of {size} bytes")
        need(hash_of(data) == digest, f"{digest.hex()}: digest")
        return data

    def get_payload(self, digest: bytes, pack: bytes, offset: int, length: int) -> bytes:
        """From the metadata's parts, or from the pack; not yet verified."""
        if digest in self.parts:
            return self.parts[digest]
        with self.path(pack).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        need(len(data) == length, f"{pack.hex()}: too short")
        return data

    # --- Metadata object

    def read_metadata(self, data: bytes) -> dict[str, Any]:
        taker = Taker(data)
        need(taker.take(8) == b"IFSMETA1", "metadata: magic")
        (length,) = taker.fields("<I")
        document = json_object(unframed(taker.take(length), DOCUMENT_LIMIT, exact=False), "document")
        (parts,) = taker.fields("<I")
        for _ in range(parts):
            digest, length = taker.fields("<32sI")
            self.parts[digest] = taker.take(length)
        pages = 0
        (runs,) = taker.fields("<I")
        for _ in range(runs):
            page, count, length = taker.fields("<QII")
            need(1 <= count <= RUN_PAGES, "page run: count")
            pages += count
            need(pages <= ALL_RUN_PAGES, "page runs: too many pages")
            self.runs.append((page, unframed(taker.take(length), count * PAGE)))
        need(not taker.rest, "metadata: something is left over")
        return document

    def check_document(self) -> None:
        document, end, spans = self.document, 0, []
        for field, kind in (
            ("source", dict),
            ("regions", list),
            ("config", list),
            ("restore", dict),
            ("page_tables", list),
        ):
            need(isinstance(document.get(field), kind), f"document: {field}")
        need(all(isinstance(document["source"].get(name), str) for name in ("format", "version")), "document: source")
        need(integer(document.get("page_size"), "document: page_size") == PAGE, "document: page_size")
        integer(document.get("native_bytes"), "document: native_bytes")
        need(
            integer(document.get("state_bytes"), "document: state_bytes") == self.size("state"), "document: state_bytes"
        )
        for region in document["regions"]:
            need(isinstance(region, dict) and isinstance(region.get("name"), str), "region: name")
            address, size = integer(region.get("guest_address"), "region"), integer(region.get("size"), "region")
            need(integer(region.get("offset"), "region") == end and size > 0, "region: place")
            need(size % PAGE == 0 and address % PAGE == 0, "region: not of whole pages")
            spans.append((address, address + size))
            end += size
        spans.sort()
        need(all(spans[i][1] <= spans[i + 1][0] for i in range(len(spans) - 1)), "regions: overlap")
        need(end == self.memory_size == integer(document.get("memory_bytes"), "memory_bytes"), "not the memory's size")
        need(all(PAGE * page + len(run) <= end for page, run in self.runs), "page run: beyond the memory")
        files = sorted(name.removeprefix("config/") for name in self.streams if name.startswith("config/"))
        need(document["config"] == files, "document: config")
        for vcpu in document.get("vcpus", []):
            need(isinstance(vcpu, dict), "vcpus")
            need(vcpu.get("mode", "real") in ("real", "protected", "compatibility", "long"), "vcpus: mode")
            for name in {*["cr0", "cr3", "cr4", "efer", "rip", "rsp", "cs", "gdt_base", "idt_base"]} & set(vcpu):
                need(re.fullmatch("0x(0|[1-9a-f][0-9a-f]{0,15})", str(vcpu[name])) is not None, f"vcpus: {name}")
        if "native_files" in document:
            self.check_native_files(document["native_files"])
        for item in document["page_tables"]:
            need(isinstance(item, list) and len(item) == 3, "page tables")
            need(0 < integer(item[1], "page tables") <= end // PAGE - integer(item[0], "page tables"), "page tables")
            need(isinstance(item[2], str) and re.fullmatch("[a-z][a-z0-9_-]{0,31}", item[2]) is not None, "page tables")

        for item in document.get("likely", []):
            need(isinstance(item, list) and len(item) == 2, "likely")
            need(0 < integer(item[1], "likely") <= end // PAGE - integer(item[0], "likely"), "likely")

    def check_native_files(self, files: object) -> None:
        need(isinstance(files, list) and len(files) > 0, "native files")
        assert isinstance(files, list)
        paths, size = set(), 0
        for file in files:
            need(isinstance(file, dict) and isinstance(file.get("path"), str), "native files: path")
            names = file["path"].encode(errors="replace").split(b"/")
            need(len(file["path"].encode(errors="replace")) <= 4095, "native files: path")
            need(
                all(0 < len(n) <= 255 and n not in (b".", b"..") and b"\0" not in n for n in names),
                "native files: path",
            )
            need(file["path"] not in paths, "native files: twice")
            paths.add(file["path"])
            size += integer(file.get("size"), "native files: size")
        for path in paths:
            steps = path.split("/")
            need(
                all("/".join(steps[:n]) not in paths for n in range(1, len(steps))), "native files: file and directory"
            )
        need(size == self.document["native_bytes"], "native files: sizes")

    def pfn(self, page: int) -> int:
        """The page frame number of a page of memory."""
        for region in self.document["regions"]:
            if region["offset"] <= PAGE * page < region["offset"] + region["size"]:
                return int(region["guest_address"] + PAGE * page - region["offset"]) // PAGE
        raise IndexError(page)

    # --- Index

    def read_block(
        self, digest: bytes, data: bytes, level: int, number: int, windows: int
    ) -> tuple[list[int], list[tuple[Any, ...]]]:
        """The slots of block ``number`` that have an entry, and the entries: digest, pack, offset, length, pages."""
        need(hash_of(data) == digest, "index block: digest")
        taker = Taker(data)
        magic, version, found, chunk_pages, slots, packs, count, reserved = taker.fields("<4sBBHHHHH")
        need((magic, version, reserved) == (b"IFSB", 1, 0), "index block: magic, version or reserved")
        need(found == level and chunk_pages == (0 if level else self.chunk_pages), "index block: level or chunk_pages")
        present = bits_of(taker.take(64))
        need(slots == min(FANOUT, -(-windows // FANOUT**level) - FANOUT * number), "index block: slots")
        need(slots >= 1 and len(present) == count and max(present, default=0) < slots, "index block: slots")
        table = [taker.take(32) for _ in range(packs)]
        entries = []
        for _ in range(count):
            child, offset, length, pack = taker.fields("<32sIIH")
            need(pack < packs and length > 0, "index entry: pack or length")
            pages = bits_of(taker.take(0 if level else self.chunk_pages // 8))
            need(level > 0 or len(pages) > 0, "index entry: pages")
            entries.append((child, table[pack], offset, length, pages))
        need(not taker.rest, "index block: too long")
        return present, entries

    def find(
        self, stream: str, window: int, only: dict[bytes, bytes] | None = None, down_to: int = 0
    ) -> tuple[Any, ...] | None:
        """The entry of a window's chunk (or of its block of a level); with ``only``, by these blocks alone."""
        root = self.streams[stream].get("root")
        if root is None:
            return None
        windows = -(-self.streams[stream]["size"] // self.window)
        level = 0
        while FANOUT ** (level + 1) < windows:
            level += 1
        digest, pack = digest_in(root.get("digest"), "root"), digest_in(root.get("pack"), "root")
        offset, length = integer(root.get("offset"), "root"), integer(root.get("length"), "root")
        while True:
            need(0 < length <= BLOCK_LIMIT, "index block: length")
            if only is None:
                data = self.get_payload(digest, pack, offset, length)
            else:
                need(digest in only, "working set: an index block is missing")
                data = only[digest]
            number = window // FANOUT ** (level + 1)
            present, entries = self.read_block(digest, data, level, number, windows)
            slot = window // FANOUT**level % FANOUT
            if slot not in present:
                return None
            entry = entries[present.index(slot)]
            if level == down_to:
                return entry
            digest, pack, offset, length, _ = entry
            level -= 1

    # --- Chunks

    def read_window(self, stream: str, window: int) -> bytes:
        entry = self.find(stream, window)
        if entry is None:
            return bytes(self.window)
        digest, pack, offset, length, pages = entry
        need(length <= PAYLOAD_LIMIT, "chunk: length")
        content = unframed(self.get_payload(digest, pack, offset, length), PAGE * len(pages))
        each = [content[at : at + PAGE] for at in range(0, len(content), PAGE)]
        need(hash_of(b"".join(map(hash_of, each))) == digest, f"{stream} window {window}: digest")
        spread = dict(zip(pages, each, strict=True))
        return b"".join(spread.get(page, bytes(PAGE)) for page in range(self.chunk_pages))

    def size(self, stream: str) -> int:
        return int(self.streams[stream]["size"])

    def read(self, stream: str, offset: int, length: int) -> bytes:
        """Bytes of a stream; fewer only at its end."""
        end = min(offset + length, self.size(stream))
        first = offset // self.window
        data = b"".join(self.read_window(stream, number) for number in range(first, -(-end // self.window)))
        return data[offset - first * self.window : end - first * self.window]

    # --- Working set

    def read_working_set(self) -> list[tuple[int, int, bytes]]:
        """Page number, recordings and bytes of each page that the set carries, in its order."""
        data = (self.store / "working-sets" / self.identity.hex()).read_bytes()
        taker = Taker(data)
        magic, manifest, size, records, pages = taker.fields("<8s32sQII")
        need(magic == b"IFSWSET1" and manifest == self.identity, "working set: magic or manifest")
        need(size == len(data) <= 1 << 29, "working set: size")
        need(pages <= 65_536 and records <= pages + 512, "working set: pages or records")
        # Whatever of the index a set needs, it brings, or the metadata object has brought.
        blocks = dict(self.parts)
        found: list[tuple[int, int, bytes]] = []
        for _ in range(records):
            kind, level, count, table, frame = taker.fields("<BBHII")
            entries, content = Taker(taker.take(table)), taker.take(frame)
            if kind == 1:
                need(count == 1, "working set: count of a block")
                (window,) = entries.fields("<Q")
                block = unframed(content, BLOCK_LIMIT, exact=False)
                self.find("memory", window, {**blocks, hash_of(block): block}, down_to=level)
                blocks[hash_of(block)] = block
            else:
                need(kind == 2 and level == 0 and 1 <= count <= 64, "working set: kind, level or count")
                found += self.carried_pages(entries, count, content, blocks)
            need(not entries.rest, "working set: table too long")
        need(not taker.rest and len(found) == pages, "working set: number of records or pages")
        need(len(blocks) - len(self.parts) <= 512, "working set: too many blocks")
        return found

    def carried_pages(
        self, entries: Taker, count: int, frame: bytes, blocks: dict[bytes, bytes]
    ) -> list[tuple[int, int, bytes]]:
        windows = []
        for _ in range(count):
            window, recordings, reserved, siblings = entries.fields("<QBBH")
            carried = bits_of(entries.take(self.chunk_pages // 8))
            need(reserved == 0 and recordings > 0 and len(carried) > 0, "working set: window")
            windows.append((window, recordings, carried, [entries.take(32) for _ in range(siblings)]))
        total = sum(len(carried) for _, _, carried, _ in windows)
        need(total <= 1087, "working set: pages of a record")
        content = Taker(unframed(frame, PAGE * total))
        found = []
        for window, recordings, carried, siblings in windows:
            need(window < -(-self.size("memory") // self.window), "working set: beyond the memory")
            entry = self.find("memory", window, blocks)
            need(entry is not None, "working set: a window of zeros")
            assert entry is not None
            digest, pages = entry[0], entry[4]
            need(set(carried) <= set(pages) and len(carried) + len(siblings) == len(pages), "working set: carried")
            each = {page: content.take(PAGE) for page in carried}
            digests = [hash_of(each[page]) if page in each else siblings.pop(0) for page in pages]
            need(hash_of(b"".join(digests)) == digest, "working set: digest")
            found += [(window * self.chunk_pages + page, recordings, data) for page, data in each.items()]
        return found

    # --- Native template

    def read_native(self) -> bytes:
        """The file that was split, from its start to its end."""
        streams = {name: self.read(name, 0, self.size(name)) for name in self.streams if not name.startswith("config/")}
        literals, memory = streams["native-literals"], streams["memory"]
        exceptions = [at for (at,) in struct.iter_unpack("<Q", streams["native-exceptions"])]
        native = b""
        for fields in struct.iter_unpack("<QQQIIII", streams["native-entries"]):
            at, literal_at, page, count, length, stride, kind = fields
            need(at == len(native), "native entry: gap or overlap")
            need(kind in (LITERAL, PAGES, BARE) and count > 0, "native entry: kind or count")
            need(length > 0 or kind == PAGES, "native entry: nothing")
            need(kind != LITERAL or (count == 1 and stride == 0), "native entry: repeated literal")
            need(stride == 0 or length >= 8, "native entry: stride without a counter")
            need(length <= (LITERAL_LIMIT if kind == LITERAL else PREFIX_LIMIT), "native entry: literal_length")
            prefix = literals[literal_at : literal_at + length]
            need(len(prefix) == length, "native entry: beyond the literals")
            for i in range(count):
                native += self.prefix_of(prefix, stride * i)
                if kind == PAGES:
                    if len(native) in exceptions:
                        source, number = streams["native-superseded"], exceptions.index(len(native))
                    else:
                        source, number = memory, page + i
                    need(PAGE * (number + 1) <= len(source), "native entry: beyond its source")
                    native += source[PAGE * number : PAGE * (number + 1)]
        need(len(native) == self.document["native_bytes"], "native file: size")
        return native

    @staticmethod
    def prefix_of(prefix: bytes, added: int) -> bytes:
        if not added:
            return prefix
        return struct.pack(">Q", (int.from_bytes(prefix[:8], "big") + added) % 2**64) + prefix[8:]

    def native_byte(self, x: int) -> int:
        """One byte of the native file, by the recipe of the page."""
        entries = self.read("native-entries", 0, self.size("native-entries"))
        found = [entry for entry in struct.iter_unpack("<QQQIIII", entries) if entry[0] <= x][-1]
        at, literal_at, page, _, length, stride, kind = found
        i, d = divmod(x - int(at), int(length) + (PAGE if kind == PAGES else 0))
        if kind == LITERAL:
            return self.read("native-literals", literal_at + d, 1)[0]
        if d < length:
            return self.prefix_of(self.read("native-literals", literal_at, length), stride * i)[d]
        table = self.read("native-exceptions", 0, self.size("native-exceptions"))
        exceptions = [at for (at,) in struct.iter_unpack("<Q", table)]
        p = x - (d - length)
        if p in exceptions:
            return self.read("native-superseded", PAGE * exceptions.index(p) + d - length, 1)[0]
        return self.read("memory", PAGE * (page + i) + d - length, 1)[0]
