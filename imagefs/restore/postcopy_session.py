"""How a postcopy migration into a QEMU begins, and how it is taken up again after a break: all up to the first page."""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from imagefs.errors import RestoreError
from imagefs.image.geometry import PAGE_SIZE
from imagefs.restore.migration_stream import PageWriter, StateParts, ask_for_bitmap, begin, resume
from imagefs.restore.mountpoint import RestoreImage
from imagefs.restore.page_ledger import PageLedger
from imagefs.restore.qmp import Qmp, QmpError
from imagefs.restore.return_path import Message, ReceivedBitmap, ResumeAcknowledged, ReturnPath
from imagefs.restore.userfaultfd import ADVICE

log = logging.getLogger(__name__)

ANSWER_SECONDS = 60.0
"""What QEMU may take for an answer of the handshake. Pulled out of the air."""
PAUSE_SECONDS = 30.0
"""What QEMU may take to see that its source has gone."""
POLL_SECONDS = 0.02

_WANTED = frozenset({"postcopy-ram", "events"})


@dataclass
class Session:
    """A connection on which the guest's pages can be sent."""

    connection: socket.socket
    writer: PageWriter
    ledger: PageLedger
    path: ReturnPath = field(default_factory=ReturnPath)
    early: list[Message] = field(default_factory=list)
    """What has come in the meantime."""


def prepare(qmp: Qmp) -> dict[str, bool]:
    """Set QEMU's capabilities; those that were changed, as they were. RestoreError where it cannot do postcopy."""
    former = {str(each["capability"]): bool(each["state"]) for each in qmp.execute("query-migrate-capabilities")}
    if "postcopy-ram" not in former:
        raise RestoreError("this QEMU cannot receive a guest by postcopy")
    changed = {name: state for name, state in former.items() if state != (name in _WANTED)}
    try:
        _set(qmp, {name: not state for name, state in changed.items()})
    except QmpError as error:
        raise RestoreError(
            f"QEMU cannot take pages later ({error.description}): if it lacks userfaultfd, {ADVICE}"
        ) from error
    return changed


def set_back(qmp: Qmp, former: dict[str, bool]) -> None:
    """Once the migration has ended: for migrations of the user's own."""
    _set(qmp, former)


def _set(qmp: Qmp, capabilities: dict[str, bool]) -> None:
    if capabilities:
        states = [{"capability": name, "state": state} for name, state in capabilities.items()]
        qmp.execute("migrate-set-capabilities", {"capabilities": states})


def start(qmp: Qmp, image: RestoreImage, parts: StateParts, directory: Path) -> Session:
    """Give a QEMU that waits (``-incoming defer``) the device state; it runs the guest as soon as it has it.

    ``directory`` is ours alone, for a socket. RestoreError and OSError where QEMU does not take it.
    """
    opening = begin(parts, image.ram_block)
    path = directory / "start"
    qmp.execute("migrate-incoming", {"uri": f"unix:{path}"})
    connection = _connect(path)
    try:
        connection.sendall(opening)
    except BaseException:
        connection.close()
        raise
    return _session(connection, image, parts, b"")


def take_up(
    qmp: Qmp, image: RestoreImage, parts: StateParts, directory: Path, patience: float = PAUSE_SECONDS
) -> Session | None:
    """Connect again to a QEMU whose source has gone; None if there is nothing left to send. Errors as with start.

    ``patience`` is how many seconds QEMU may take to see that the source has gone. Its main loop may itself wait for a
    page, so nothing is asked of it that it executes there.
    """
    path = directory / "again"
    deadline = time.monotonic() + patience
    while True:
        try:
            # A listener that nobody connected to is given up for the new one.
            qmp.execute("migrate-recover", {"uri": f"unix:{path}"}, out_of_band=True)
            break
        except QmpError:
            # It may not have noticed yet.
            if migration_status(qmp) == "completed":
                return None
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)
    connection = _connect(path)
    try:
        return _shake_hands(connection, image, parts)
    except BaseException:
        connection.close()
        raise


def migration_status(qmp: Qmp) -> str | None:
    """The last that an event has told of the migration."""
    for event in reversed(qmp.events):
        if event["event"] == "MIGRATION":
            return str(event.get("data", {}).get("status"))
    return None


def _shake_hands(connection: socket.socket, image: RestoreImage, parts: StateParts) -> Session:
    """QEMU before 8.2 does not get over a break in here, so it is short, and not done by a source."""
    path = ReturnPath()
    early: list[Message] = []
    bitmap: bytes | None = None
    connection.sendall(ask_for_bitmap(image.ram_block))
    connection.settimeout(ANSWER_SECONDS)
    while True:
        try:
            data = connection.recv(1 << 20)
        except TimeoutError:
            raise RestoreError(f"QEMU did not answer its new source within {ANSWER_SECONDS:g} seconds") from None
        if not data:
            raise RestoreError("QEMU closed the connection of its new source")
        acknowledged = False
        for message in path.feed(data):
            if isinstance(message, ReceivedBitmap):
                bitmap = message.bitmap
                connection.sendall(resume())
            elif isinstance(message, ResumeAcknowledged):
                acknowledged = True
            else:
                early.append(message)
        if acknowledged:
            break
    if bitmap is None or len(bitmap) * 8 < image.ram_bytes // PAGE_SIZE:
        raise RestoreError("QEMU goes on without having said which pages it has")
    connection.settimeout(None)
    session = _session(connection, image, parts, bitmap)
    session.path, session.early = path, early
    return session


def _session(connection: socket.socket, image: RestoreImage, parts: StateParts, received: bytes) -> Session:
    writer = PageWriter(image.ram_block, parts.section, parts.footers)
    return Session(connection, writer, PageLedger(image.ram_bytes // PAGE_SIZE, received))


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection
