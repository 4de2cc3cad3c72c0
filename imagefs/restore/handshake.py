"""How a VMM hands its memory over: Firecracker's handshake, from its documentation of page faults on snapshot resume.

We listen; the VMM connects and sends one message, a JSON array with an object for each region of guest memory, and its
userfaultfd along with it (SCM_RIGHTS):

| field                | meaning                                                                                       |
|----------------------|-----------------------------------------------------------------------------------------------|
| base_host_virt_addr  | where the region is in the VMM's address space                                                |
| size                 | bytes                                                                                         |
| offset               | of the region in the memory file                                                              |
| page_size            | bytes: 4096, or 2097152 for hugetlbfs                                                         |
| page_size_kib        | the same, also in bytes, whatever its name says; what older versions send                     |
| userfaultfd          | our own shim's: the descriptor's number in the VMM, so that it is found again (reattach.py)   |

A message may come without the descriptor; then another brings it. The connection stays open until the VMM ends. Nothing
is answered. Who connects need not mean well: each connection has a bounded time and size, and none holds up another.
"""

from __future__ import annotations

import array
import json
import logging
import os
import selectors
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from imagefs.errors import RestoreError
from imagefs.image.geometry import PAGE_SIZE
from imagefs.pager import PagerError, PagerRegion, check_regions
from imagefs.restore.child import Process
from imagefs.restore.listening import MOST_CLIENTS, Listener
from imagefs.restore.peer import Peer, is_userfaultfd

log = logging.getLogger(__name__)

SECONDS = 10.0
"""What a VMM may take from connecting to having handed over. Pulled out of the air: they do so at once."""
LONGEST = 64 << 10
"""Bytes: 64 regions take 10 KiB."""
MOST_FDS = 8

_FIELDS = ("base_host_virt_addr", "size", "offset")
_PAGE_SIZES = ("page_size", "page_size_kib")


class HandshakeError(RestoreError):
    """What came is not the handshake, or does not fit the image."""


class UnfinishedError(HandshakeError):
    """It is not the handshake yet."""


@dataclass
class Handover:
    """What a VMM has handed over; ours to close."""

    uffd: int
    regions: tuple[PagerRegion, ...]
    peer: Peer
    number: int | None = None
    """Of the userfaultfd in the VMM, where it told."""

    def close(self) -> None:
        os.close(self.uffd)
        self.peer.close()


def parse_regions(text: bytes) -> tuple[tuple[PagerRegion, ...], int | None]:
    """The regions, and the userfaultfd's number if it is there. UnfinishedError where more may have to come."""
    try:
        items = json.loads(text.decode())
    except json.JSONDecodeError as error:
        # Everything up to the end is well: the rest of it is on its way.
        unfinished = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        raise (UnfinishedError if unfinished else HandshakeError)(f"no JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise HandshakeError(f"no JSON: {error}") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise HandshakeError("not an array of regions")
    regions = tuple(_region(number, item) for number, item in enumerate(items))
    number = items[0].get("userfaultfd") if items else None
    return regions, number if isinstance(number, int) and number >= 0 else None


def _region(number: int, item: Mapping[str, Any]) -> PagerRegion:
    address, size, offset = (_number(number, item, name) for name in _FIELDS)
    given = {_number(number, item, name) for name in _PAGE_SIZES if item.get(name) is not None}
    if len(given) > 1:
        raise HandshakeError(f"region {number}: page_size and page_size_kib differ")
    return PagerRegion(address, size, offset, given.pop() if given else PAGE_SIZE)


def _number(number: int, item: Mapping[str, Any], name: str) -> int:
    value = item.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise HandshakeError(f"region {number}: {name} is {str(value)[:40]}")
    return value


def check_fit(regions: tuple[PagerRegion, ...], size: int) -> None:
    """HandshakeError where a VMM with such regions is not that of a memory of ``size`` bytes."""
    try:
        check_regions(regions, size // PAGE_SIZE)
    except PagerError as error:
        raise HandshakeError(error.reason) from error
    total = sum(region.size for region in regions)
    if total != size:
        raise HandshakeError(f"its regions have {total:,} bytes in all, the image's memory {size:,}")


@dataclass
class _Client:
    """A connection on which the handshake is under way."""

    connection: socket.socket
    peer: Peer
    deadline: float
    text: bytearray = field(default_factory=bytearray)
    fds: list[int] = field(default_factory=list)
    last: int = 0
    """Where in the text the message begins with which the descriptor came."""

    def receive(self) -> None:
        """HandshakeError, OSError."""
        data, ancillary, flags, _ = self.connection.recvmsg(
            LONGEST, socket.CMSG_SPACE(MOST_FDS * 4), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        )
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                self.fds += numbers
                self.last = len(self.text)
        self.text += data
        if len(self.fds) > 1 or flags & socket.MSG_CTRUNC:
            raise HandshakeError("more than one file descriptor")
        if self.fds and not is_userfaultfd(f"/proc/self/fd/{self.fds[0]}"):
            raise HandshakeError("the file descriptor is no userfaultfd")
        if len(self.text) > LONGEST:
            raise HandshakeError(f"a message of more than {LONGEST:,} bytes")
        if not data:
            missing = "all of its message" if self.fds else "a file descriptor"
            raise HandshakeError(f"it hung up before {missing} had come")

    def finish(self, size: int) -> Handover:
        """What was handed over; the descriptors are the caller's then. UnfinishedError, HandshakeError."""
        try:
            # As Firecracker's own handlers: what came before the descriptor does not count, unless it belongs to it.
            regions, number = parse_regions(bytes(self.text[self.last :]))
        except HandshakeError:
            regions, number = parse_regions(bytes(self.text))
        check_fit(regions, size)
        if not self.fds:
            raise UnfinishedError("it sent no file descriptor")
        return Handover(self.fds.pop(), regions, self.peer, number)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.peer.close()


def wait_for_handover(listener: Listener, size: int, until: Process | None = None) -> Handover | None:
    """The first VMM that hands over a memory of ``size`` bytes; None once ``until`` has ended.

    Others are refused, with a line in the log.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(listener.socket, selectors.EVENT_READ)
        if until is not None:
            selector.register(until, selectors.EVENT_READ)
        try:
            return _Waiting(listener, selector, size, until).run()
        finally:
            for key in list(selector.get_map().values()):
                if isinstance(key.data, _Client):
                    key.data.close()


class _Waiting:
    def __init__(self, listener: Listener, selector: selectors.BaseSelector, size: int, until: Process | None) -> None:
        self._listener = listener
        self._selector = selector
        self._size = size
        self._until = until

    def run(self) -> Handover | None:
        while True:
            clients = [key.data for key in self._selector.get_map().values() if isinstance(key.data, _Client)]
            now = time.monotonic()
            for client in clients:
                if client.deadline <= now:
                    self._refuse(client, HandshakeError(f"it handed nothing over within {SECONDS:g} seconds"))
            first = min((client.deadline for client in clients if client.deadline > now), default=None)
            for key, _ in self._selector.select(None if first is None else first - now):
                if key.fileobj is self._until:
                    return None
                if key.fileobj is self._listener.socket:
                    self._accept(len(clients))
                elif handover := self._serve(key.data):
                    return handover

    def _accept(self, clients: int) -> None:
        try:
            connection = self._listener.socket.accept()[0]
        except OSError as error:
            log.debug("%s: %s", self._listener.path, error)
            return
        client = _Client(connection, Peer.of_connection(connection), time.monotonic() + SECONDS)
        self._selector.register(connection, selectors.EVENT_READ, client)
        if clients >= MOST_CLIENTS:
            self._refuse(client, HandshakeError("too many others are connected"))

    def _serve(self, client: _Client) -> Handover | None:
        try:
            client.receive()
            handover = client.finish(self._size)
        except UnfinishedError:
            return None
        except (HandshakeError, OSError) as error:
            self._refuse(client, error)
            return None
        self._selector.unregister(client.connection)
        return handover

    def _refuse(self, client: _Client, error: Exception) -> None:
        log.warning("%s: %s is refused: %s", self._listener.path, client.peer, error)
        self._selector.unregister(client.connection)
        client.close()
