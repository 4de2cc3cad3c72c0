"""Serving a VMM that hands its memory over, by the supervisor of a pager: one of ours, Firecracker, or a survivor."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from imagefs.errors import ImagefsError
from imagefs.image.geometry import PAGE_SIZE
from imagefs.pager import Status
from imagefs.restore.child import Vmm
from imagefs.restore.handshake import Handover, wait_for_handover
from imagefs.restore.listening import Listener
from imagefs.restore.mountpoint import MountedImage, RestoreImage
from imagefs.restore.pager_sources import page_count
from imagefs.restore.pager_supervisor import PagerSupervisor
from imagefs.restore.reattach import Survivor
from imagefs.restore.shared_state import SharedState

log = logging.getLogger(__name__)


def serve_vmm(image: RestoreImage, vmm: Vmm, listener: Listener, state_fd: int, connected: Callable[[], None]) -> None:
    """Serve the VMM that we have started until it has ended, or has all of its memory.

    ``state_fd``, an empty memfd that it has too, stays the caller's. ``connected`` is called once the listener has
    done its work. ImagefsError and OSError after the VMM was ended.
    """
    try:
        pages = page_count(image)
        with SharedState.begun(os.dup(state_fd), pages) as state:
            handover = wait_for_handover(listener, pages * PAGE_SIZE, vmm)
            connected()
            # If there is none, it has ended before it needed memory; it has said itself why.
            if handover is not None:
                try:
                    PagerSupervisor(image, handover, state).run()
                finally:
                    handover.close()
    except (ImagefsError, OSError):
        # What was started may be a script around QEMU.
        vmm.end()
        raise


def serve_socket(image: MountedImage, path: Path) -> int:
    """Serve the first VMM that connects to ``path``, until it has ended or has all of its memory; exit status.

    UsageError where nobody can listen there, RestoreError after the VMM had to be stopped. Interrupted, it leaves the
    state behind for :func:`reattach`.
    """
    pages = page_count(image)
    with ExitStack() as stack:
        listener = stack.enter_context(Listener(path))
        state = stack.enter_context(SharedState.beside(path, pages))
        try:
            log.info("%s: waiting for a VMM", path)
            handover = wait_for_handover(listener, pages * PAGE_SIZE)
            assert handover is not None
        except BaseException:
            state.forget()
            raise
        listener.close()
        stack.callback(handover.close)
        return _serve_to_the_end(image, handover, state)


def reattach(image: MountedImage, survivor: Survivor) -> int:
    """Serve a VMM whose supervisor has died; the rest as :func:`serve_socket`."""
    with survivor.state as state:
        try:
            return _serve_to_the_end(image, survivor.handover, state)
        finally:
            survivor.handover.close()


def _serve_to_the_end(image: MountedImage, handover: Handover, state: SharedState) -> int:
    status = PagerSupervisor(image, handover, state).run()
    state.forget()
    log.info("%s %s", handover.peer, "has all of its memory" if status is Status.COMPLETE else "has ended")
    return 0
