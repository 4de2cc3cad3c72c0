"""Processes that a restore starts: the VMM, whose fate is ours, and workers, which can be killed without harm.

A worker is forked without exec, so the process that uses this has no threads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

from imagefs.errors import ImagefsError, RestoreError

log = logging.getLogger(__name__)

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 1.0
SECONDS_TO_END = 10.0
"""What a VMM that was told to end may take. Pulled out of the air."""
SECONDS_TO_DIE = 2.0


class Process(Protocol):
    def fileno(self) -> int:
        """Readable once the process has ended."""


def ends(process: Process, seconds: float) -> bool:
    """Whether it ends within that time."""
    return bool(select.select([process], [], [], seconds)[0])


class Vmm:
    """The VMM that we have started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._status: int | None = None

    def fileno(self) -> int:
        return self._pidfd

    def wait(self) -> int:
        """Its exit status, negative for a signal's."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def end(self) -> None:
        """Tell it to; at last kill it. Waits."""
        self.pass_on(signal.SIGTERM)
        if not ends(self, SECONDS_TO_END):
            self.pass_on(signal.SIGKILL)
        self.wait()

    def pass_on(self, number: int, frame: FrameType | None = None) -> None:
        """A signal handler."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.Signals(number))

    def close(self) -> None:
        os.close(self._pidfd)


@contextmanager
def started(
    program: str,
    command: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Vmm]:
    """A VMM to which signals that we get are passed on until the context is left. RestoreError where none starts."""
    # Signals in between find no VMM to be passed to, and wait.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    former = {}
    try:
        for fd in pass_fds:
            os.set_inheritable(fd, True)
        try:
            # What the caller gave us open beside these is for it, too: a tap device by its number.
            pid = os.posix_spawn(
                program,
                list(command),
                {**os.environ, **(environment or {})},
                setsigmask=before,
                setsigdef=IGNORED_BY_PYTHON,
            )
        except OSError as error:
            raise RestoreError(f"{program}: {error.strerror}") from error
        finally:
            for fd in pass_fds:
                os.set_inheritable(fd, False)
        vmm = Vmm(pid)
        former = {number: signal.signal(number, vmm.pass_on) for number in PASSED_ON}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    try:
        yield vmm
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        vmm.close()


class Worker:
    """A child that does its work until it has done it, or is killed."""

    def __init__(self, name: str, body: Callable[[], int]) -> None:
        """Forks. ``body`` runs in the child and returns its exit status; errors are logged under ``name``."""
        self._born = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            _run_worker(name, body)
        self._pidfd = os.pidfd_open(self.pid)

    def __repr__(self) -> str:
        return f"<Worker {self.pid}>"

    def fileno(self) -> int:
        return self._pidfd

    @property
    def age(self) -> float:
        """Seconds since it was forked."""
        return time.monotonic() - self._born

    def kill(self) -> None:
        """Unless it has been reaped. Does not wait for long: a thread of it may be in a read of a mount that hangs."""
        if self._pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if ends(self, SECONDS_TO_DIE):
            self.reap()

    def reap(self) -> int:
        """Wait for its end; exit status, negative for a signal's. Once."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._pidfd)
        self._pidfd = -1
        return status


def _run_worker(name: str, body: Callable[[], int]) -> None:
    """In the child: does not return."""
    status = 1
    try:
        for number in PASSED_ON:
            # What the terminal sends to all of us is the VMM's to decide on.
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        status = body()
    except (ImagefsError, OSError) as error:
        log.error("%s: %s", name, error)
    except BaseException:
        log.exception("%s", name)
    finally:
        os._exit(status)


class Pauses:
    """How long to wait before another worker: not at all after a useful one, else longer each time."""

    def __init__(self, longest: float = LONGEST_PAUSE) -> None:
        self._longest = longest
        self._next = 0.0

    def before_next(self, was_useful: bool) -> float:
        """Seconds."""
        if was_useful:
            self._next = 0.0
        pause, self._next = self._next, min(max(FIRST_PAUSE, 2 * self._next), self._longest)
        return pause


@contextmanager
def private_directory() -> Iterator[Path]:
    """For sockets, whose names have 107 bytes at most."""
    directory = Path(tempfile.mkdtemp(prefix="imagefs-", dir=os.environ.get("XDG_RUNTIME_DIR")))
    owner = os.getpid()
    try:
        yield directory
    finally:
        # Not in a worker, and not where a forked one unwinds.
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)
