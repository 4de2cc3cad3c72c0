"""Where fetched pages go: the interface between ``fetch`` and ``cache``.

``fetch`` does not import ``cache``; whoever opens an image passes a sink. All methods may be called from several
threads at once, and after :meth:`PageSink.close` they do nothing: an abandoned fetch thread may still come back.
"""

from __future__ import annotations

from typing import Any, Protocol


class PageSink(Protocol):
    """Pages of ``memory`` that have arrived and were verified, and index blocks."""

    def read(self, offset: int, length: int) -> bytes | None:
        """Bytes of ``memory``, None unless all pages that they lie in are here. Offsets are within the memory."""

    def has(self, first: int, count: int) -> bool:
        """Whether these pages are all here."""

    def put(self, first: int, data: bytes | memoryview) -> bool:
        """Take in whole pages from page number ``first`` on. False where they could not be kept (a full disk)."""

    @property
    def full(self) -> bool:
        """Whether the newest pages could not be kept."""

    def put_zeros(self, first: int, count: int) -> None:
        """Note pages as here whose bytes are all zero."""

    def distrusted(self, first: int, count: int) -> bytes | None:
        """The bytes of pages that were here before the host crashed: to be verified and then put, or dropped."""

    def block(self, digest: bytes) -> bytes | None:
        """An index block that was put, not verified again."""

    def put_block(self, digest: bytes, data: bytes) -> None: ...

    def working_set(self) -> bytes | None:
        """What was put under this name, by this mount or an earlier one of the image; not looked at."""

    def put_working_set(self, text: bytes) -> None:
        """Keep the recordings of this host, if that is possible: they are a hint."""

    def bitmap(self, offset: int, length: int) -> bytes:
        """Bytes of the presence bitmap: page p is bit p % 8, LSB first, of byte p // 8."""

    def statistics(self) -> dict[str, Any]:
        """For people: kind, place, state (JSON values)."""

    def close(self) -> None: ...
