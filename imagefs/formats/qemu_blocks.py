"""The block table, with which the RAM section of a QEMU migration stream begins.

| bytes | field   | meaning                                                                                      |
|------:|---------|----------------------------------------------------------------------------------------------|
|     8 | header  | the sum of the blocks' sizes, its low 12 bits MEM_SIZE (0x004)                               |
|     … | blocks  | until their sizes make up the sum: name (length byte, ASCII), size u64 in bytes; in          |
|       |         | x-ignore-shared streams the block's address u64; in mapped-ram files what                    |
|       |         | qemu_mapped_ram.py describes                                                                 |

Where postcopy was announced, blocks of huge pages have their page size there too; such streams are refused at the
announcement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from imagefs.errors import UnsupportedInputError
from imagefs.formats.qemu_machine import guest_memory, may_be_guest_memory
from imagefs.formats.qemu_state import StateWriter
from imagefs.formats.stream_cursor import StreamCursor
from imagefs.image.geometry import PAGE_SIZE

FLAGS = PAGE_SIZE - 1
"""The bits of a record's header that are flags."""
FLAG_MEM_SIZE = 0x04

TABLE = "RAM block table"
_MAX_BLOCKS = 4096
_MAX_SIZE = 1 << 46
"""Bytes of all blocks: 64 TiB, with which sparse files and 64-bit offsets still get along."""


@dataclass(slots=True)
class Block:
    """One RAM block of the table; ``sent`` once a page of it was in the stream."""

    name: str
    size: int
    first: int
    """Its first page's number: in the flat guest memory if it is ``guest_memory``, else among all other blocks."""
    guest_memory: bool
    address: int = 0
    """In x-ignore-shared streams: where in RAM as a whole it begins, bytes."""
    sent: bool = False


class BlockTable(Mapping[str, Block]):
    """All blocks by name, in the table's order."""

    def __init__(self) -> None:
        self._blocks: dict[str, Block] = {}
        self.memory_pages = 0
        """Of guest memory, so far."""
        self.other_pages = 0

    def __getitem__(self, name: str) -> Block:
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def guest_memory(self) -> list[Block]:
        """Guest memory: its blocks end to end."""
        return [block for block in self._blocks.values() if block.guest_memory]

    def add(self, name: str, size: int, address: int, memory: bool | None = None) -> Block:
        """The next block; whether it is guest ``memory`` is told, or guessed from what was before it."""
        if memory is None:
            memory = may_be_guest_memory(name, size, {block.name: block.size for block in self.guest_memory})
        if memory:
            block = Block(name, size, self.memory_pages, True, address)
            self.memory_pages += size // PAGE_SIZE
        else:
            block = Block(name, size, self.other_pages, False, address)
            self.other_pages += size // PAGE_SIZE
        self._blocks[name] = block
        return block


def read_block_table(
    cursor: StreamCursor,
    state: StateWriter,
    addresses: bool,
    contents: Callable[[Block, int], None] | None = None,
) -> BlockTable:
    """The blocks; into the state goes the table without addresses. ``contents`` is called behind each block's fields,
    with the pages of all blocks; what is guest memory is then guessed from the blocks so far (QEMU sorts them by size).
    """
    at = cursor.position
    header = cursor.u64(TABLE)
    if header & FLAGS != FLAG_MEM_SIZE:
        raise cursor.error(f"the RAM section begins with {header:#x}, not with MEM_SIZE", TABLE, back=8)
    left = header & ~FLAGS
    if left > _MAX_SIZE:
        raise cursor.error(f"{left:,} bytes of memory are over {_MAX_SIZE:,}", TABLE, back=8)
    state.raw(header.to_bytes(8, "big"))
    guessed = BlockTable()
    while left:
        if len(guessed) == _MAX_BLOCKS:
            raise cursor.error(f"more than {_MAX_BLOCKS} blocks", TABLE)
        name = cursor.string("RAM block name")
        if name in guessed:
            raise cursor.error(f"{name!r} is there twice", "RAM block name", back=len(name))
        size = cursor.u64("RAM block size")
        if size % PAGE_SIZE or size > left:
            raise cursor.error(f"{size:#x} is impossible for block {name!r}", "RAM block size", back=8)
        block = guessed.add(name, size, cursor.u64("RAM block address") if addresses else 0)
        left -= size
        state.raw(bytes([len(name)]) + name.encode("ascii") + size.to_bytes(8, "big"))
        if contents is not None:
            contents(block, (header & ~FLAGS) // PAGE_SIZE)
    memory = guest_memory({name: block.size for name, block in guessed.items()}, at)
    if not guessed[memory[0]].size:
        raise UnsupportedInputError(f"block {memory[0]!r} is empty", field=TABLE, offset=at)
    if memory == [block.name for block in guessed.guest_memory]:
        return guessed
    if contents is not None:
        names = ", ".join(repr(block.name) for block in guessed.guest_memory)
        raise UnsupportedInputError(f"{names}: not the guest's memory, as it seemed", field=TABLE, offset=at)
    table = BlockTable()
    for name, block in guessed.items():
        table.add(name, block.size, block.address, name in memory)
    return table
