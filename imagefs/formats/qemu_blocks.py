"""The block table, with which the RAM section of a QEMU migration stream begins.

| bytes | field   | meaning                                                                                      |
|------:|---------|----------------------------------------------------------------------------------------------|
|     8 | header  | the sum of the blocks' sizes, its low 12 bits MEM_SIZE (0x004)                               |
|     … | blocks  | until their sizes make up the sum: name (length byte, ASCII), size u64 in bytes, and only in |
|       |         | x-ignore-shared streams the block's address u64                                              |

Where postcopy was announced, blocks of huge pages have their page size there too; such streams are refused at the
announcement.
"""

from __future__ import annotations

from dataclasses import dataclass

from imagefs.errors import UnsupportedInputError
from imagefs.formats.qemu_machine import main_block
from imagefs.formats.qemu_state import StateWriter
from imagefs.formats.qemu_stream import StreamCursor
from imagefs.image.geometry import PAGE_SIZE

FLAGS = PAGE_SIZE - 1
"""The bits of a record's header that are flags."""
FLAG_MEM_SIZE = 0x04

TABLE = "RAM block table"
_MAX_BLOCKS = 4096


@dataclass(slots=True)
class Block:
    """One RAM block of the table; ``sent`` once a page of it was in the stream."""

    name: str
    size: int
    sent: bool = False


def read_block_table(cursor: StreamCursor, state: StateWriter, addresses: bool) -> tuple[dict[str, Block], Block]:
    """All blocks by name, and the one that is the guest's memory; into the state goes the table without addresses."""
    at = cursor.position
    header = cursor.u64(TABLE)
    if header & FLAGS != FLAG_MEM_SIZE:
        raise cursor.error(f"the RAM section begins with {header:#x}, not with MEM_SIZE", TABLE, back=8)
    state.raw(header.to_bytes(8, "big"))
    left = header & ~FLAGS
    sizes: dict[str, int] = {}
    while left:
        if len(sizes) == _MAX_BLOCKS:
            raise cursor.error(f"more than {_MAX_BLOCKS} blocks", TABLE)
        name = cursor.string("RAM block name")
        if name in sizes:
            raise cursor.error(f"{name!r} is there twice", "RAM block name", back=len(name))
        size = cursor.u64("RAM block size")
        if size % PAGE_SIZE or size > left:
            raise cursor.error(f"{size:#x} is impossible for block {name!r}", "RAM block size", back=8)
        if addresses:
            cursor.u64("RAM block address")
        sizes[name] = size
        left -= size
        state.raw(bytes([len(name)]) + name.encode("ascii") + size.to_bytes(8, "big"))
    main = main_block(sizes, at)
    if not sizes[main]:
        raise UnsupportedInputError(f"block {main!r} is empty", field=TABLE, offset=at)
    blocks = {name: Block(name, size) for name, size in sizes.items()}
    return blocks, blocks[main]
