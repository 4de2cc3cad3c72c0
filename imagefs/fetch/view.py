"""What a mount asks of an opened image: the interface between ``mount`` and ``fetch``.

:class:`imagefs.fetch.opened.OpenedImage` is the real one; tests of the mount bring scripted ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from imagefs.image.geometry import Geometry
from imagefs.image.native_files import NativeFile
from imagefs.image.streams import (
    CONFIG_PREFIX,
    MEMORY,
    NATIVE_ENTRIES,
    NATIVE_EXCEPTIONS,
    NATIVE_LITERALS,
    NATIVE_SUPERSEDED,
    STATE,
)

__all__ = [
    "CONFIG_PREFIX",
    "MEMORY",
    "NATIVE_ENTRIES",
    "NATIVE_EXCEPTIONS",
    "NATIVE_LITERALS",
    "NATIVE_SUPERSEDED",
    "STATE",
    "Arrivals",
    "ImageView",
    "PageInfo",
    "PageState",
    "Run",
    "Trace",
]

PageState = Literal["zero", "present", "remote"]


@dataclass(frozen=True, slots=True)
class PageInfo:
    """One page of ``memory``: where its bytes are now, what verifies it, what the guest uses it for."""

    state: PageState
    digest: str | None
    """``blake3:<hex>``, the digest of the chunk in which the page travels; None for a zero page."""
    kind: str
    """``ram``, or ``pml4|pdpt|pd|pt`` for page-table frames."""


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` pages of ``memory`` from page number ``page`` on."""

    page: int
    count: int


class Arrivals(Protocol):
    """Page runs in the order of their arrival, for any number of independent readers.

    A reader's cursor starts at 0; the runs that had arrived before come first. ``read`` answers at once with the
    runs after the cursor (at most ``limit`` of them) and the cursor after them.
    """

    def read(self, cursor: int, limit: int) -> tuple[list[Run], int]: ...

    async def wait(self, cursor: int) -> None:
        """Return when ``read(cursor, …)`` would answer with at least one run, or all pages have arrived."""

    @property
    def complete(self) -> bool:
        """Whether every page of the image is here: after that no run will ever be added."""


class Trace(Protocol):
    """First touches of windows or pages, in order; bounded."""

    def text(self) -> bytes:
        """Lines ``SECONDS PAGE COUNT ORIGIN``: seconds since the mount, page number, pages, who touched."""

    def append_text(self, data: bytes) -> None:
        """Lines of the same form from a restore helper; UsageError for anything else, naming the line."""


class ImageView(Protocol):
    """An image opened for reading, its fetching under way in a nursery owned by the mount."""

    @property
    def name(self) -> str:
        """STORE/NAME as the user gave it, without credentials."""

    @property
    def geometry(self) -> Geometry: ...

    @property
    def document(self) -> Mapping[str, Any]:
        """The content of ``metadata.json`` (JSON values)."""

    @property
    def native_size(self) -> int:
        """Bytes of the file that was split."""

    @property
    def native_files(self) -> Sequence[NativeFile]:
        """The files that the native stream holds end to end; empty where it is one file."""

    @property
    def streams(self) -> Mapping[str, int]:
        """Size in bytes of every stream, by name."""

    @property
    def arrivals(self) -> Arrivals: ...

    @property
    def trace(self) -> Trace: ...

    async def read(self, stream: str, offset: int, length: int, *, touch: bool = True) -> bytes:
        """Verified bytes of a stream, waiting for those that are not here. Shorter only at the stream's end.

        ``touch`` counts the read as a demand of the guest or a tool (for the trace). Raises StoreError
        (missing, corrupt), TimedOutError on a soft mount. Cancelling it leaves the fetch to other waiters.
        """

    def read_present(self, stream: str, offset: int, length: int, *, touch: bool = True) -> bytes | None:
        """The same without waiting: None where any of it is not here. Never blocks on the network."""

    async def page_info(self, page: int) -> PageInfo:
        """About one page of ``memory``, without fetching it (an index block may be fetched)."""

    def present_bitmap(self, offset: int, length: int) -> bytes:
        """Bytes of the presence bitmap: bit i of byte j (LSB first) is page 8 j + i of ``memory``."""

    def status(self) -> dict[str, Any]:
        """The content of ``.imagefs/status.json`` (JSON values), without the mount's own counters."""
