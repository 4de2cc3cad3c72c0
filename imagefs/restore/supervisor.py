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
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from imagefs.errors import ImagefsError, RestoreError
from imagefs.restore import postcopy_session
from imagefs.restore.migration_stream import StateParts
from imagefs.restore.mountpoint import RestoreImage
from imagefs.restore.postcopy_session import Session, migration_status, prepare, set_back, take_up
from imagefs.restore.postcopy_source import PostcopySource
from imagefs.restore.qmp import Qmp

log = logging.getLogger(__name__)

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
START_SECONDS = 120.0
"""What QEMU may take until its monitor speaks."""
BY_HAND_SECONDS = 2.0
"""Who asks for a recovery has seen that there is no source; only where there is one QEMU goes on refusing."""
SHORT_LIFE, FIRST_PAUSE, LONGEST_PAUSE = 0.25, 0.02, 1.0
"""Seconds: a source that lived shorter is followed by the next after a pause, which doubles each time."""


def serve(session: Session, image: RestoreImage) -> bool:
    """Be the source; whether QEMU has everything."""
    source = PostcopySource(session.connection, image, session.writer, session.ledger, session.path)
    return source.run(session.early)


class Supervisor:
    """Runs one QEMU and its sources; :meth:`run` once."""

    def __init__(self, image: RestoreImage, parts: StateParts) -> None:
        self._image = image
        self._parts = parts
        self._source: tuple[int, int] | None = None  # process, pidfd
        self._qmp: Qmp | None = None
        self._born = 0.0
        self._pause = 0.0
        self._capabilities: dict[str, bool] = {}

    def run(self, program: str, make_command: Callable[[int], Sequence[str]]) -> int:
        """QEMU's exit status, negative for a signal's. ``make_command`` is given the file number of our monitor.

        RestoreError where the guest cannot be brought to it; then QEMU is ended.
        """
        with _private_directory() as directory:
            ours, its = socket.socketpair()
            with its:
                try:
                    command = list(make_command(its.fileno()))
                    # Signals in between find no QEMU to be passed to, and wait.
                    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
                    qemu = subprocess.Popen(
                        command,
                        executable=program,
                        pass_fds=[its.fileno()],
                        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON),
                    )
                except OSError as error:
                    ours.close()
                    raise RestoreError(f"{program}: {error.strerror}") from error
            pidfd = os.pidfd_open(qemu.pid)
            try:
                with _signals_to(pidfd):
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
                    return self._supervise(qemu, pidfd, ours, directory)
            finally:
                os.close(pidfd)

    def _supervise(self, qemu: subprocess.Popen[bytes], pidfd: int, monitor: socket.socket, directory: Path) -> int:
        try:
            self._qmp = Qmp(monitor, "QEMU's monitor", START_SECONDS, out_of_band=True)
            self._capabilities = prepare(self._qmp)
            self._fork_source(postcopy_session.start(self._qmp, self._image, self._parts, directory))
        except (ImagefsError, OSError) as error:
            if not _ends(pidfd, 2.0):
                qemu.terminate()
                if not _ends(pidfd, 10.0):
                    qemu.kill()
                qemu.wait()
                if isinstance(error, ImagefsError):
                    raise
                raise RestoreError(f"QEMU did not take the guest: {error.strerror or error}") from error
            return qemu.wait()  # it has said itself why
        while True:
            watched: list[int | Qmp] = [pidfd]
            watched += [each for each in (self._qmp, self._source and self._source[1]) if each is not None]
            ready = select.select(watched, [], [])[0]
            if pidfd in ready:
                return qemu.wait()
            if self._qmp is not None and self._qmp in ready:
                try:
                    self._qmp.poll()
                except ImagefsError as error:
                    log.debug("%s", error)
                    self._forget_monitor()
            if self._source is not None and self._source[1] in ready:
                self._source_ended(pidfd, directory)
            if self._source is None and self._qmp is not None and migration_status(self._qmp) == "completed":
                self._completed()

    # ---- the source ----

    def _fork_source(self, session: Session) -> None:
        self._born = time.monotonic()
        process = os.fork()
        if not process:
            self._be_source(session)
        session.connection.close()
        self._source = process, os.pidfd_open(process)
        log.info("process %d sends the guest's pages, %r", process, session.ledger)

    def _be_source(self, session: Session) -> None:
        """In the child: does not return."""
        status = 1
        try:
            for number in PASSED_ON:
                # What the terminal sends to all of us is QEMU's to decide on.
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
            if self._qmp is not None:
                self._qmp.close()
            status = 0 if serve(session, self._image) else 1
        except (ImagefsError, OSError) as error:
            log.error("page source: %s", error)
        except BaseException:
            log.exception("page source")
        finally:
            os._exit(status)

    def _source_ended(self, qemu: int, directory: Path) -> None:
        assert self._source is not None
        process, pidfd = self._source
        self._source = None
        os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status == 0 or self._qmp is None:
            return
        lived = time.monotonic() - self._born
        while not _ends(qemu, self._pause if lived < SHORT_LIFE else 0.0):
            self._pause = 0.0 if lived >= SHORT_LIFE else min(max(FIRST_PAUSE, 2 * self._pause), LONGEST_PAUSE)
            lived = 0.0
            try:
                session = take_up(self._qmp, self._image, self._parts, directory)
            except (ImagefsError, OSError) as error:
                if not _ends(qemu, FIRST_PAUSE):
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
    with _private_directory() as directory, Qmp.connect(qmp_path, out_of_band=True) as qmp:
        session = take_up(qmp, image, parts, directory, BY_HAND_SECONDS)
    if session is None:
        return True
    return serve(session, image)


def _describe(status: int) -> str:
    return f"signal {-status}" if status < 0 else "its connection broke"


def _ends(pidfd: int, seconds: float) -> bool:
    """Whether a process ends within that time."""
    return bool(select.select([pidfd], [], [], seconds)[0])


@contextmanager
def _private_directory() -> Iterator[Path]:
    # A socket's name has 107 bytes at most.
    directory = Path(tempfile.mkdtemp(prefix="imagefs-", dir=os.environ.get("XDG_RUNTIME_DIR")))
    owner = os.getpid()
    try:
        yield directory
    finally:
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _signals_to(pidfd: int) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.Signals(number))

    former = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
