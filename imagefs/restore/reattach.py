"""Find a VMM's userfaultfd and the pager's state again after everyone else has died, and end a pager that has not.

QEMU keeps both open (``native/preload_pager.c``), so both are fetched from it with pidfd_getfd(2). A VMM that we did
not start, such as Firecracker, has its userfaultfd; the state is the file beside the socket.
"""

from __future__ import annotations

import logging
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from imagefs.errors import RestoreError, UsageError
from imagefs.pager import fetch_descriptor
from imagefs.restore.handshake import Handover
from imagefs.restore.peer import Peer, is_userfaultfd, start_time
from imagefs.restore.shared_state import Record, SharedState
from imagefs.restore.shim import STATE_NAME

log = logging.getLogger(__name__)

SECONDS_TO_DIE = 30.0
"""A pager that is killed may have a thread in a read of the mount, which ends when the page arrives."""

_LOST = (
    "what the guest gave back of its memory is forgotten, and to begin anew would show it old content: "
    "stop it, and restore it again"
)


@dataclass(frozen=True, slots=True)
class Survivor:
    """A VMM that waits for a pager; ours to close."""

    handover: Handover
    state: SharedState


def find_by_pid(pid: int) -> Survivor:
    """A QEMU that was started by the door pager. UsageError and RestoreError where it lacks what is needed."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise UsageError(f"process {pid}: {error.strerror}") from error
    with _closing_unless_done(pidfd):
        numbers = _descriptors(pid)
        states = [number for number, link in numbers.items() if link.startswith(f"/memfd:{STATE_NAME} ")]
        if not states:
            raise RestoreError(f"process {pid} holds no pager's state: {_LOST}")
        state = SharedState(_fetch(pid, pidfd, states[0]))
        record = state.read()
        if record is None:
            raise RestoreError(f"process {pid} has not handed its memory over: there is nothing to take over")
        return _survivor(pid, pidfd, state, record)


def find_by_socket(socket: Path) -> Survivor:
    """The VMM that was served through a socket. Errors as :func:`find_by_pid`."""
    state = SharedState.found_beside(socket)
    record = state.read()
    if record is None or not record.pid:
        raise RestoreError(f"{state.path}: does not say which VMM it belongs to: {_LOST}")
    pidfd = None
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(record.pid)
    # Looked at once the process is held: until then, another may get its number.
    if pidfd is None or record.started is None or start_time(record.pid) != record.started:
        state.forget()
        raise RestoreError(f"process {record.pid}, which was served through {socket}, has ended: nothing is left to do")
    with _closing_unless_done(pidfd):
        return _survivor(record.pid, pidfd, state, record)


def _survivor(pid: int, pidfd: int, state: SharedState, record: Record) -> Survivor:
    numbers = _descriptors(pid)
    found = [number for number in sorted(numbers) if is_userfaultfd(f"/proc/{pid}/fd/{number}")]
    if record.uffd in found:
        found = [record.uffd]
    if not found:
        raise RestoreError(
            f"process {pid} has no userfaultfd any more: what it had not touched reads as zeros. Stop it at once"
        )
    handover = Handover(_fetch(pid, pidfd, found[0]), (), Peer(pid, pidfd))
    # Before the pager is ended: whoever supervises would begin another.
    state.begin_supervising()
    _end_pager(state)
    return Survivor(handover, state)


def _end_pager(state: SharedState) -> None:
    """A pager that goes on without its supervisor: ours takes over."""
    pid = state.paging_process()
    if pid is None:
        return
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not select.select([pidfd], [], [], SECONDS_TO_DIE)[0]:
                raise RestoreError(f"the pager, process {pid}, was killed and does not end: the mount does not answer")
        finally:
            os.close(pidfd)
    log.info("the pager, process %d, was ended for a new one", pid)


def _descriptors(pid: int) -> dict[int, str]:
    """Numbers and what they link to."""
    directory = Path(f"/proc/{pid}/fd")
    found = {}
    try:
        for entry in directory.iterdir():
            with suppress(FileNotFoundError):
                found[int(entry.name)] = os.readlink(entry)
    except OSError as error:
        raise RestoreError(f"{directory}: {error.strerror}; {_permission(pid)}") from error
    return found


def _fetch(pid: int, pidfd: int, number: int) -> int:
    try:
        return fetch_descriptor(pidfd, number)
    except OSError as error:
        raise RestoreError(f"process {pid}, file {number}: {error.strerror}; {_permission(pid)}") from error


def _permission(pid: int) -> str:
    return (
        f"taking over needs the right to trace process {pid}: its user, where sysctl kernel.yama.ptrace_scope is 0, "
        "or the capability CAP_SYS_PTRACE"
    )


@contextmanager
def _closing_unless_done(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise
