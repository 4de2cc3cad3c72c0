"""A store that fails as it is told: faults are injected by wrapping, never by patching."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from imagefs.store.base import DEFAULT_LIMIT
from imagefs.store.directory import DirectoryStore


@dataclass
class ScriptedStore(DirectoryStore):
    """A directory store whose ``get`` asks ``script`` first: it may raise, wait, or return other bytes."""

    directory: DirectoryStore
    script: Callable[[str, int, int | None], bytes | None] = field(default=lambda key, start, length: None)
    gets: list[tuple[str, int, int | None]] = field(default_factory=list)
    piece: int = 1 << 16
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(self.directory.root)
        self.gate.set()

    def get(self, key: str, start: int = 0, length: int | None = None, limit: int = DEFAULT_LIMIT) -> bytes:
        self.gets.append((key, start, length))
        self.gate.wait()
        answer = self.script(key, start, length)
        return super().get(key, start, length, limit) if answer is None else answer

    def stream(self, key: str, start: int = 0, limit: int = DEFAULT_LIMIT) -> Iterator[bytes]:
        """As ``get`` of the rest, in pieces of :attr:`piece` bytes, each of which asks the script."""
        end = self.directory.size(key)
        while start < end:
            length = min(self.piece, end - start)
            yield self.get(key, start, length)
            start += length
