"""Keeps a pager alive for a VMM that has handed its memory over, until the VMM has ended or needs none any more.

The supervisor holds a copy of the userfaultfd and the shared state, and does nothing else: whoever kills the pager sees
the next one within milliseconds. It has no threads: it forks.
"""

from __future__ import annotations

import errno
import logging
import select
import signal

from imagefs.errors import RestoreError
from imagefs.image.geometry import PAGE_SIZE
from imagefs.pager import Status
from imagefs.restore.child import Pauses, ends
from imagefs.restore.handshake import Handover
from imagefs.restore.memory_reader import identity, mount_status
from imagefs.restore.mountpoint import MountedImage
from imagefs.restore.pager_worker import Job, Outcome, PagerWorker
from imagefs.restore.peer import Peer, start_time
from imagefs.restore.shared_state import Record, SharedState

log = logging.getLogger(__name__)

LONG_LIFE = 2.0
"""Seconds: after a pager that lived as long, the mount is taken to be well again."""
LONGEST_PAUSE = 5.0
"""Seconds between attempts to read a mount. Pulled out of the air."""
SECONDS_TO_DIE = 5.0
"""A VMM whose memory has gone has ended, but for a moment. Pulled out of the air."""


class PagerSupervisor:
    """Serves one VMM; :meth:`run` once."""

    def __init__(self, image: MountedImage, handover: Handover, state: SharedState) -> None:
        """For a new ``state``, which gets its record; for one that has it, it is seen to that the image is the same.

        RestoreError where it is not, or another process supervises; MountError and OSError where it does not show.
        """
        self._image = image
        self._peer = handover.peer
        self._state = state
        self._is_soft = mount_status(image, "mount", "options", "hard") is False
        self._in_trouble = False
        self._pauses = Pauses()
        self._patience = Pauses(LONGEST_PAUSE)
        state.begin_supervising()
        record = state.read()
        if record is None:
            pages = image.memory_size() // PAGE_SIZE
            pid = handover.peer.pid
            record = Record(identity(image), pages, pid, start_time(pid), handover.number)
            state.write(record)
        elif record.identity != identity(image):
            raise RestoreError(f"{image.mountpoint}: this is not the image that {handover.peer} was resumed from")
        self._job = Job(image, record.identity, handover.uffd, state, handover.regions, handover.peer)

    def run(self) -> Status:
        """COMPLETE, if the VMM has all of its memory and goes on alone, or VMM_GONE.

        RestoreError after the VMM had to be stopped, with the reason.
        """
        worker = self._new_worker()
        try:
            while worker is not None:
                before = self._installed()
                if not self._wait_for(worker):
                    break
                outcome = worker.outcome()
                ended = self._end(outcome)
                if ended is not None:
                    return ended
                pauses = self._pauses if isinstance(outcome, int) else self._patience
                if ends(self._peer, pauses.before_next(self._installed() != before)):
                    break
                worker = self._new_worker()
            return Status.VMM_GONE
        finally:
            if worker is not None:
                worker.kill()

    def _new_worker(self) -> PagerWorker | None:
        """None if the VMM has ended before one could be had."""
        while True:
            try:
                worker = PagerWorker(self._job)
            except OSError as error:
                log.warning("no pager can be started: %s; trying again, the guest waits", error.strerror)
                if ends(self._peer, self._patience.before_next(False)):
                    return None
                continue
            log.info("process %d pages the memory of %s", worker.pid, self._peer)
            return worker

    def _wait_for(self, worker: PagerWorker) -> bool:
        """Until it has ended; False if the VMM ended first."""
        watched: list[Peer | PagerWorker] = [self._peer, worker]
        while not (ready := select.select(watched, [], [], LONG_LIFE if self._in_trouble else None)[0]):
            self._in_trouble = False
            log.warning("%s can be read again", self._image.memory)
        return self._peer not in ready

    def _end(self, outcome: Outcome | int) -> Status | None:
        """What it means for the VMM; None where another pager is to go on."""
        if isinstance(outcome, int):
            log.warning("the pager was killed (%s), a new one goes on", signal.Signals(outcome).name)
            return None
        if outcome.status == Status.COMPLETE.name:
            log.info("all of the memory of %s is there", self._peer)
            return Status.COMPLETE
        if outcome.status == Status.VMM_GONE.name:
            # Its threads end one after the other.
            ends(self._peer, SECONDS_TO_DIE)
            return Status.VMM_GONE
        if outcome.reading and not (self._is_soft and outcome.reading == errno.EIO):
            if not self._in_trouble:
                self._in_trouble = True
                log.warning("%s; trying again, the guest waits", outcome.reason)
            return None
        stopped = "stopped" if self._peer.kill() else "to be stopped, which is not permitted here"
        raise RestoreError(f"{self._peer} was {stopped}: {outcome.reason}")

    def _installed(self) -> int:
        """Pages: what a pager was good for."""
        counted = self._state.statistics()
        return counted.copied_pages + counted.zero_pages if counted else 0
