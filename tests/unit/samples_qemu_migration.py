"""Samples of QEMU migration streams."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.samples import Length, Sample
from tests.unit.streams import Built, Mapped, Options, Record, build, build_mapped, page_of, u32

_FULL = Options(
    uuid=bytes(range(16)), page_bits=12, commands=[(1, b""), (2, bytes(4))], late_commands=[(11, b"")], devices=()
)
_RECORDS = [
    [Record("zlib", "pc.ram", 0, page_of(1)), Record("fill", "pc.ram", 1, b"\0")],
    [Record("page", "pc.ram", 2, page_of(2)), Record("fill", "vga.vram", 0, b"\0")],
    [Record("zlib", "vga.vram", 1, page_of(4)), Record("page", "pc.ram", 2, page_of(5))],
]


def _sample(name: str, built: Built, machine: str) -> Sample:
    zlib_at = next(at for at, record in built.records if record.kind == "zlib") + 8 + 1 + len("pc.ram")
    table = built.data.index(b"\6pc.ram")
    lengths = (
        Length("length of machine type", 9, 4, refused=(0, len(machine) + 1)),
        Length("length of block name", table, 1, refused=(0, 5, 7)),
        Length("bytes of a block", table + 7, 8, refused=(0, 1, 4096)),
        Length("bytes of a zlib page", zlib_at, 4, refused=(0, 1)),
        Length("length of description", built.eof_at + 2, 4, refused=(0, 1)),
    )
    # Cut just behind EOF, a stream is one without a description, and nothing of the guest is missing.
    return Sample.of_file(name, "qemu-migration", built.data, lengths, lambda _, length: length == built.eof_at + 1)


_WITH_DEVICES = replace(_FULL, devices=Options().devices)
_SHARED = build(
    [[Record("fill", "vga.vram", 1, b"\0")]],
    replace(
        _WITH_DEVICES, capabilities=["x-ignore-shared"], blocks={"ram": 4 * 4096, "vga.vram": 2 * 4096}, main="ram"
    ),
)
_RAM = b"".join(map(page_of, range(4)))

_DELTA = page_of(2)[:100] + b"new" + page_of(2)[103:]
_DELTAS = build([*_RECORDS[:2], [Record("xbzrle", "pc.ram", 2, _DELTA)], _RECORDS[2]], _WITH_DEVICES)
_DELTA_AT = _DELTAS.data.index(b"\1\0\5\x64\3new")
_NODES = build(
    [[Record("page", "node1", 1, page_of(1)), Record("page", "node0", 0, page_of(2))], []],
    replace(_WITH_DEVICES, blocks={"node1": 3 * 4096, "node0": 2 * 4096}, main="node1", more_main=["node0"]),
)
_MAPPED = build_mapped(
    {"pc.ram": Mapped(3 * 4096, {0: page_of(1)}, {2: page_of(3)}), "pc.rom": Mapped(4096, {0: page_of(2)})}, ["pc.ram"]
)
_MAPPED_AT = _MAPPED.data.index(b"\6pc.ram") + 15
_MAPPED_LENGTHS = (
    Length("page size", _MAPPED_AT + 4, 8, refused=(0, 1, 8192)),
    Length("bitmap offset", _MAPPED_AT + 12, 8, refused=(0, 1)),
    Length("pages offset", _MAPPED_AT + 20, 8, refused=(0, 1)),
)


SAMPLES = [
    Sample.of_file(
        "qemu-migration-xbzrle",
        "qemu-migration",
        _DELTAS.data,
        (Length("bytes of a delta", _DELTA_AT + 1, 2, refused=(0, 1)),),
        lambda _, length: length == _DELTAS.eof_at + 1,
    ),
    Sample.of_file(
        "qemu-migration-numa", "qemu-migration", _NODES.data, may_end=lambda _, length: length == _NODES.eof_at + 1
    ),
    Sample.of_file(
        "qemu-migration-mapped",
        "qemu-migration",
        _MAPPED.data,
        _MAPPED_LENGTHS,
        lambda _, length: length == _MAPPED.eof_at + 1,
    ),
    _sample("qemu-migration", build(_RECORDS, _WITH_DEVICES), "pc-i440fx-7.2"),
    Sample(
        "qemu-migration-shared",
        "qemu-migration",
        {"state": _SHARED.data, "ram": _RAM},
        "state",
        ("ram",),
        (Length("bytes of a block", _SHARED.data.index(b"\3ram" + u32(0)) + 4, 8, file="state", refused=(0, 1, 4096)),),
        lambda file, length: file == "state" and length == _SHARED.eof_at + 1,
    ),
]
