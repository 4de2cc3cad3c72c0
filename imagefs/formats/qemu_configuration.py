"""The configuration section of a QEMU migration stream: the machine, and what the destination must be like.

As in QEMU's migration/savevm.c (vmstate_configuration), integers big-endian:

| bytes | field        | meaning                                                                                 |
|------:|--------------|-----------------------------------------------------------------------------------------|
|     1 | type         | 0x07                                                                                    |
|     4 | length       | of the machine type                                                                     |
|     … | machine type | ASCII                                                                                   |
|     … | subsections  | each 0x05, name (length byte, ASCII), version u32, and for ``configuration/capabilities`` |
|       |              | a u32 and so many names, ``…/target-page-bits`` a u32, ``…/uuid`` 16 bytes                |
"""

from __future__ import annotations

from dataclasses import dataclass, field

from imagefs.formats.qemu_state import StateWriter
from imagefs.formats.stream_cursor import StreamCursor

CONFIGURATION, SUBSECTION = 0x07, 0x05
TARGET_PAGE_BITS = 12

IGNORE_SHARED = "x-ignore-shared"
MAPPED_RAM = "mapped-ram"
_CAPABILITIES = (IGNORE_SHARED, MAPPED_RAM)
"""Those that QEMU tells the destination of, and that are understood."""

_MAX_MACHINE_NAME = 255
_MAX_CAPABILITIES = 256


@dataclass
class Configuration:
    """What the section says; a stream may have none."""

    machine: str = ""
    capabilities: list[str] = field(default_factory=list)
    uuid: bytes = b""


def read_configuration(cursor: StreamCursor, state: StateWriter) -> Configuration:
    """The section at the cursor. It goes into the state without the capabilities, which would bind the destination to
    the same form."""
    found = Configuration()
    cursor.u8("section type")
    length = cursor.u32("length of machine type")
    if length > _MAX_MACHINE_NAME:
        raise cursor.error(f"{length} bytes", "length of machine type", back=4)
    found.machine = cursor.text(length, "machine type")
    state.raw(bytes([CONFIGURATION]) + length.to_bytes(4, "big") + found.machine.encode("ascii"))
    while cursor.peek_u8("section type") == SUBSECTION:
        _read_subsection(cursor, state, found)
    return found


def _read_subsection(cursor: StreamCursor, state: StateWriter, found: Configuration) -> None:
    at = cursor.position
    cursor.u8("section type")
    name = cursor.string("configuration subsection")
    version = cursor.u32(f"version of {name}")
    header = bytes([SUBSECTION, len(name)]) + name.encode("ascii") + version.to_bytes(4, "big")
    back = cursor.position - at
    if version != 1:
        raise cursor.error(f"version {version} of {name!r} is not understood", "configuration subsection", back)
    if name == "configuration/capabilities":
        found.capabilities += _read_capabilities(cursor)
    elif name == "configuration/target-page-bits":
        bits = cursor.u32("target page bits")
        if bits != TARGET_PAGE_BITS:
            raise cursor.error(
                f"{bits}: only guests with pages of {1 << TARGET_PAGE_BITS} bytes are supported",
                "target page bits",
                back=4,
            )
        state.raw(header + bits.to_bytes(4, "big"))
    elif name == "configuration/uuid":
        found.uuid = cursor.take(16, "uuid")
        state.raw(header + found.uuid)
    else:
        raise cursor.error(f"{name!r} is not understood", "configuration subsection", back)


def _read_capabilities(cursor: StreamCursor) -> list[str]:
    count = cursor.u32("number of capabilities")
    if count > _MAX_CAPABILITIES:
        raise cursor.error(f"{count} are too many", "number of capabilities", back=4)
    names = []
    for _ in range(count):
        name = cursor.string("capability")
        if name not in _CAPABILITIES:
            raise cursor.error(f"{name!r} is not understood", "capability", back=len(name))
        names.append(name)
    return names
