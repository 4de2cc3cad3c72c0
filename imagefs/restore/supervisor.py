"""The parent of a QEMU whose guest comes by postcopy: keeps a page source alive until QEMU has everything.

QEMU is our child for as long as it lives: its exit status is ours, and the signals that we get are passed on to it. It
has a monitor of ours, besides those that the user gave it. The source is another child, forked without exec, so that it
can be killed without harm: QEMU pauses its migration, the guest waits at the next page that has not come, and a new
source takes it up. If we are killed ourselves, QEMU and the source go on.

This process has no threads: it forks.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from imagefs.errors import ImagefsError, RestoreError
from imagefs.restore import postcopy_session
from imagefs.restore.child import FIRST_PAUSE, Pauses, Vmm, Worker, ends, private_directory, started
from imagefs.restore.migration_stream import StateParts
from imagefs.restore.mountpoint import RestoreImage
from imagefs.restore.postcopy_session import Session, migration_status, prepare, set_back, take_up
from imagefs.restore.postcopy_source import PostcopySource
from imagefs.restore.qmp import Qmp

log = logging.getLogger(__name__)

START_SECONDS = 120.0
"""What QEMU may take until its monitor speaks."""
BY_HAND_SECONDS = 2.0
"""Who asks for a recovery has seen that there is no source; only where there is one QEMU goes on refusing."""
SHORT_LIFE = 0.25
"""Seconds: a source that lived shorter is followed by the next after a pause."""


def serve(session: Session, image: RestoreImage) -> bool:
    """Be the source; whether QEMU has everything."""
    source = PostcopySource(session.connection, image, session.writer, session.ledger, session.path)
    return source.run(session.early)


class Supervisor:
    """Runs one QEMU and its sources; :meth:`run` once."""

    def __init__(self, image: RestoreImage, parts: StateParts) -> None:
        self._image = image
        self._parts = parts
        self._source: Worker | None = None
        self._qmp: Qmp | None = None
        self._pauses = Pauses()
        self._capabilities: dict[str, bool] = {}

    def run(self, program: str, make_command: Callable[[int], Sequence[str]]) -> int:
        """QEMU's exit status, negative for a signal's. ``make_command`` is given the file number of our monitor.

        RestoreError where the guest cannot be brought to it; then QEMU is ended.
        """
        with ExitStack() as stack:
            directory = stack.enter_context(private_directory())
            ours, its = socket.socketpair()
            stack.enter_context(ours)
            with its:
                command = make_command(its.fileno())
                qemu = stack.enter_context(started(program, command, pass_fds=[its.fileno()]))
            return self._supervise(qemu, ours, directory)

    def _supervise(self, qemu: Vmm, monitor: socket.socket, directory: Path) -> int:
        try:
            self._qmp = Qmp(monitor, "QEMU's monitor", START_SECONDS, out_of_band=True)
            self._capabilities = prepare(self._qmp)
            self._fork_source(postcopy_session.start(self._qmp, self._image, self._parts, directory))
        except (ImagefsError, OSError) as error:
            if not ends(qemu, 2.0):
                qemu.end()
                if isinstance(error, ImagefsError):
                    raise
                raise RestoreError(f"QEMU did not take the guest: {error.strerror or error}") from error
            return qemu.wait()  # it has said itself why
        while True:
            watched: list[Vmm | Qmp | Worker] = [qemu]
            watched += [each for each in (self._qmp, self._source) if each is not None]
            ready = select.select(watched, [], [])[0]
            if qemu in ready:
                return qemu.wait()
            if self._qmp is not None and self._qmp in ready:
                try:
                    self._qmp.poll()
                except ImagefsError as error:
                    log.debug("%s", error)
                    self._forget_monitor()
            if self._source is not None and self._source in ready:
                self._source_ended(qemu, directory)
            if self._source is None and self._qmp is not None and migration_status(self._qmp) == "completed":
                self._completed()

    # ---- the source ----

    def _fork_source(self, session: Session) -> None:
        self._source = Worker("page source", partial(self._be_source, session))
        session.connection.close()
        log.info("process %d sends the guest's pages, %r", self._source.pid, session.ledger)

    def _be_source(self, session: Session) -> int:
        """In the child."""
        if self._qmp is not None:
            self._qmp.close()
        return 0 if serve(session, self._image) else 1

    def _source_ended(self, qemu: Vmm, directory: Path) -> None:
        assert self._source is not None
        source, self._source = self._source, None
        status = source.reap()
        if status == 0 or self._qmp is None:
            return
        lived = source.age >= SHORT_LIFE
        while not ends(qemu, self._pauses.before_next(lived)):
            lived = False
            try:
                session = take_up(self._qmp, self._image, self._parts, directory)
            except (ImagefsError, OSError) as error:
                if not ends(qemu, FIRST_PAUSE):
                    log.warning("the guest's pages: %s; trying again, the guest waits", error)
                continue
            if session is not None:
                log.warning("the page source ended (%s), a new one goes on", _describe(status))
                self._fork_source(session)
            return

    def _completed(self) -> None:
        """QEMU runs on alone: nothing of ours is needed any more, nor is the mount."""
        assert self._qmp is not None
        log.info("all of the guest's memory is there")
        with contextlib.suppress(ImagefsError):
            set_back(self._qmp, self._capabilities)
        self._forget_monitor()

    def _forget_monitor(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
        self._qmp = None


def recover(image: RestoreImage, parts: StateParts, qmp_path: Path) -> bool:
    """Be the new source of a QEMU whose supervising process has gone, too; whether it has everything in the end.

    ``qmp_path`` is a monitor of the user's; it is free again once pages flow. Errors as with :func:`take_up`.
    """
    with private_directory() as directory, Qmp.connect(qmp_path, out_of_band=True) as qmp:
        session = take_up(qmp, image, parts, directory, BY_HAND_SECONDS)
    if session is None:
        return True
    return serve(session, image)


def _describe(status: int) -> str:
    return f"signal {-status}" if status < 0 else "its connection broke"
