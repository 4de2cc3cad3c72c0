"""Capture a running QEMU over its monitor (QMP): stop it, and read its migration stream while it stands still.

Where guest RAM is a shared file that this host can read, the stream is saved with x-ignore-shared and holds the
device state only: the pages are read from the RAM file. Everywhere else the stream holds the pages as well.

Nothing is lost when anything fails, here or in whoever consumes the stream: QEMU's settings become what they were,
and a guest that ran goes on.
"""

from __future__ import annotations

import contextlib
import enum
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from imagefs.errors import RestoreError
from imagefs.restore.qmp import Qmp, QmpClosedError, QmpError
from imagefs.restore.ram_file import shared_ram_file

log = logging.getLogger(__name__)

FD_NAME = "imagefs-suspend"
UNLIMITED = 1 << 40
"""Bytes per second. QEMU's default is 128 MiB/s, also into a pipe."""

BUFFER_SIZE = 1 << 20
SETTLE_SECONDS = 60.0
"""What QEMU may take to end a migration whose stream has ended. Pulled out of the air."""

POLL_SECONDS = 0.01

_STOPPABLE = frozenset({"running", "paused", "prelaunch", "postmigrate", "io-error"})
"""Run states (query-status) of a guest whose state can be saved and makes sense."""

_ENDED = frozenset({"completed", "failed", "cancelled"})
_IGNORE_SHARED = "x-ignore-shared"
_HARMLESS = frozenset({"events"})
"""Capabilities that change nothing in the stream; all others are off while we save, whatever the user set."""


class Afterwards(enum.Enum):
    """What becomes of the guest once it has been captured."""

    STAY = "stays paused"
    RESUME = "goes on"
    QUIT = "is ended"


@dataclass(frozen=True)
class Suspended:
    """A guest that stands still, inside the context of :func:`suspended`."""

    stream: BinaryIO
    """The migration stream, read once from its start to its end. Reading its end raises RestoreError if QEMU failed."""
    memory_files: Sequence[Path]
    """At most one, the RAM file, whose pages are not in the stream; it may be read until the context is left."""
    ran: bool
    """Whether the guest was running before."""


@contextmanager
def suspended(qmp_path: str | Path, afterwards: Afterwards = Afterwards.STAY) -> Iterator[Suspended]:
    """Stop the guest behind a QMP socket and save it into the stream that the body of the ``with`` consumes.

    A guest that stays paused is in QEMU's state ``postmigrate``: ``cont`` lets it go on. One that is in that state
    already is saved anew, for which QEMU must let it run for a moment: if it went there because it was migrated
    away to another host, don't. With RESUME a guest whose pages are in the stream goes on as soon as the stream
    has been read, before the body ends.

    Raises UsageError where no QEMU listens, RestoreError where it refuses or fails; whatever the body raises passes.
    """
    with Qmp.connect(qmp_path) as qmp:
        state = _check_state(qmp)
        ram_file = shared_ram_file(qmp)
        ran = state == "running"

        def at_end() -> None:
            _check_completed(qmp)
            if afterwards is Afterwards.RESUME and ram_file is None:
                _go_on(qmp)

        try:
            _stop(qmp, state)
            with _settings(qmp, ignore_shared=ram_file is not None), _migration(qmp, at_end) as stream:
                yield Suspended(stream, [ram_file] if ram_file else [], ran)
            if afterwards is Afterwards.RESUME:
                _go_on(qmp)
        except BaseException:
            if ran:
                _try(f"{qmp_path}: the guest could not be resumed", lambda: _go_on(qmp))
            raise
        if afterwards is Afterwards.QUIT:
            _quit(qmp)


# ---- the guest ----


def _check_state(qmp: Qmp) -> str:
    """The run state; RestoreError where it is none to save a guest in."""
    state = str(qmp.execute("query-status")["status"])
    if state not in _STOPPABLE:
        raise RestoreError(f"{qmp.name}: the guest is in state {state!r}, in which it cannot be suspended")
    status = qmp.execute("query-migrate").get("status", "none")
    if status not in _ENDED | {"none"}:
        raise RestoreError(f"{qmp.name}: a migration is under way already ({status})")
    return state


def _stop(qmp: Qmp, state: str) -> None:
    if state == "postmigrate":
        # QEMU refuses to save a guest twice from this state.
        qmp.execute("cont")
    qmp.execute("stop")


def _go_on(qmp: Qmp) -> None:
    """``cont``, once QEMU has left the migration; a guest that runs already just runs."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            qmp.execute("cont")
            return
        except QmpError:
            if qmp.execute("query-status")["status"] != "finish-migrate" or time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def _quit(qmp: Qmp) -> None:
    with contextlib.suppress(QmpClosedError):
        qmp.execute("quit")
    qmp.wait_closed()


def _try(what: str, action: Callable[[], object]) -> None:
    """Clean up on the way of another error, which must not be hidden by one of our own."""
    try:
        action()
    except RestoreError as error:
        log.warning("%s: %s", what, error)


# ---- the migration ----


@contextmanager
def _settings(qmp: Qmp, ignore_shared: bool) -> Iterator[None]:
    """QEMU set to write a plain stream as fast as it can; afterwards as it was. While no migration runs."""
    former = {str(each["capability"]): bool(each["state"]) for each in qmp.execute("query-migrate-capabilities")}
    wanted = {name: name == _IGNORE_SHARED and ignore_shared for name in former if name not in _HARMLESS}
    changed = {name: state for name, state in wanted.items() if former[name] != state}
    parameters = qmp.execute("query-migrate-parameters")
    limits = {"max-bandwidth": UNLIMITED, "tls-creds": ""}
    limits = {name: value for name, value in limits.items() if parameters.get(name, value) != value}
    try:
        _set(qmp, changed, limits)
        yield
    finally:
        _try(
            f"{qmp.name}: QEMU's migration settings could not be set back",
            lambda: _set(qmp, {name: former[name] for name in changed}, {name: parameters[name] for name in limits}),
        )


def _set(qmp: Qmp, capabilities: Mapping[str, bool], parameters: Mapping[str, Any]) -> None:
    if capabilities:
        # In one command: some are allowed only together with others.
        states = [{"capability": name, "state": state} for name, state in capabilities.items()]
        qmp.execute("migrate-set-capabilities", {"capabilities": states})
    if parameters:
        qmp.execute("migrate-set-parameters", parameters)


@contextmanager
def _migration(qmp: Qmp, at_end: Callable[[], None]) -> Iterator[BinaryIO]:
    """The stream of a migration into a pipe. When the context is left no migration runs any more."""
    reading, writing = os.pipe()
    raw = _MigrationStream(reading, qmp.name, at_end)
    # BufferedReader is a BinaryIO in all but name.
    stream = cast(BinaryIO, io.BufferedReader(raw, BUFFER_SIZE))
    try:
        try:
            qmp.execute("getfd", {"fdname": FD_NAME}, fds=[writing])
        finally:
            os.close(writing)
        try:
            qmp.execute("migrate", {"uri": f"fd:{FD_NAME}"})
        except BaseException:
            _try("the pipe stays with QEMU", lambda: qmp.execute("closefd", {"fdname": FD_NAME}))
            raise
        yield stream
        while stream.read(BUFFER_SIZE):
            pass  # the consumer may know before the last byte that it has seen all it needs
    except BaseException:
        _try(f"{qmp.name}: the migration could not be cancelled", lambda: _cancel(qmp, raw))
        raise
    finally:
        stream.close()


def _cancel(qmp: Qmp, stream: io.RawIOBase) -> None:
    qmp.execute("migrate_cancel")
    stream.close()  # QEMU may be blocked in a write
    _wait_for_end(qmp)


def _wait_for_end(qmp: Qmp) -> dict[str, Any]:
    """What query-migrate says once the migration has ended, or where there has been none."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        answer: dict[str, Any] = qmp.execute("query-migrate")
        if answer.get("status", "none") in _ENDED | {"none"}:
            return answer
        if time.monotonic() > deadline:
            raise RestoreError(f"{qmp.name}: the migration does not end ({answer['status']})")
        time.sleep(POLL_SECONDS)


def _check_completed(qmp: Qmp) -> None:
    answer = _wait_for_end(qmp)
    if answer.get("status") != "completed":
        reason = answer.get("error-desc", "QEMU gives no reason")
        raise RestoreError(f"{qmp.name}: saving the guest has {answer.get('status', 'not happened')}: {reason}")


class _MigrationStream(io.RawIOBase):
    """The read end of QEMU's pipe. At its end ``at_end`` is called, once, before the end is reported.

    QEMU closes the pipe also when it fails: so a consumer never takes a stream that was cut off for a whole one.
    """

    def __init__(self, fd: int, name: str, at_end: Callable[[], None]) -> None:
        self.name = f"the stream from {name}"
        self._fd = fd
        self._at_end = at_end
        self._ended = False

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def readinto(self, buffer: Any) -> int:
        count = os.readv(self._fd, [buffer])
        if count == 0 and not self._ended:
            self._ended = True
            self._at_end()
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()
