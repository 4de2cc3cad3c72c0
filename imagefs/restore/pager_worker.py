"""The process that pages: can be killed at any time, another one takes over."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

from imagefs.errors import MountError
from imagefs.pager import Pager, PagerError, PagerRegion, Status
from imagefs.restore.child import Process, Worker
from imagefs.restore.memory_reader import identity
from imagefs.restore.mountpoint import MountedImage
from imagefs.restore.pager_sources import opened
from imagefs.restore.shared_state import SharedState

SECONDS_OF_EVENTS = 0.5
"""How long the last pager takes what a VMM still has to say: it said so before it was told that nobody listens."""
MESSAGE = 256
LONGEST_REPORT = 4096


@dataclass(frozen=True, slots=True)
class Job:
    """All that a pager needs to know."""

    image: MountedImage
    identity: str
    uffd: int
    state: SharedState
    regions: tuple[PagerRegion, ...]
    """Where the state is new; an old one knows better."""
    vmm: Process


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a pager ended, other than by a signal."""

    status: str
    """Of :class:`imagefs.pager.Status`, its name."""
    reason: str = ""
    reading: int = 0
    """Errno, where the mount could not be read: later it may be."""


class PagerWorker(Worker):
    """A pager in a process of its own."""

    def __init__(self, job: Job) -> None:
        ours, its = os.pipe()
        self._report = ours
        try:
            super().__init__("pager", _reporting(job, its))
        except OSError:
            os.close(ours)
            raise
        finally:
            os.close(its)

    def outcome(self) -> Outcome | int:
        """After it has ended, once; the number of the signal that killed it."""
        status = self.reap()
        text = os.read(self._report, LONGEST_REPORT)
        os.close(self._report)
        if status < 0:
            return -status
        try:
            return Outcome(**json.loads(text))
        except (ValueError, TypeError):
            return Outcome(Status.FAILED.name, "it ended without a word")


def _reporting(job: Job, pipe: int) -> Callable[[], int]:
    def body() -> int:
        outcome = page(job)
        os.write(pipe, json.dumps(asdict(outcome)).encode())
        return 0

    return body


def page(job: Job) -> Outcome:
    """Serve until there is nothing more to do, or it cannot go on."""
    job.state.begin_paging()
    try:
        if identity(job.image) != job.identity:
            return Outcome(Status.FAILED.name, f"{job.image.mountpoint}: another image is mounted there now", 1)
        with opened(job.image, trace=True) as sources:
            pager = Pager(
                job.uffd,
                job.regions,
                sources.memory_fd,
                pages=sources.pages,
                state_fd=job.state.fd,
                cache=sources.cache,
                arrivals_fd=sources.arrivals_fd,
                trace_fd=sources.trace_fd,
                order=sources.order,
            )
            return _serve(pager, job)
    except PagerError as error:
        return Outcome(Status.FAILED.name, str(error))
    except MountError as error:
        return Outcome(Status.FAILED.name, str(error), 1)
    except OSError as error:
        return Outcome(Status.FAILED.name, f"{error.filename}: {error.strerror}", error.errno or 1)


def _serve(pager: Pager, job: Job) -> Outcome:
    pager.start()
    select.select([pager, job.vmm], [], [])
    status, error = pager.status, pager.error
    if status is Status.COMPLETE:
        # So that the mount is free at once, and not when the last thread has left.
        pager.close()
        _drain(job.uffd)
    if error is not None:
        return Outcome(status.name, f"{job.image.memory}: {error.reason}", error.reading)
    return Outcome((Status.VMM_GONE if status is Status.RUNNING else status).name)


def _drain(uffd: int) -> None:
    """A VMM that gave pages back at that very moment waits until it is read that it did."""
    deadline = time.monotonic() + SECONDS_OF_EVENTS
    while (left := deadline - time.monotonic()) > 0 and select.select([uffd], [], [], left)[0]:
        with suppress(BlockingIOError):
            os.read(uffd, MESSAGE)
