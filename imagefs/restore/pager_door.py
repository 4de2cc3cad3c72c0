"""The door *pager*: the VMM's RAM is anonymous memory under userfaultfd, and a process of ours brings its pages.

A VMM hands its memory over through a socket (:mod:`~imagefs.restore.handshake`). Firecracker does so by itself; QEMU,
which maps the mount's ``memory``, by a preloaded shim that puts anonymous memory in the file's place
(``native/preload_pager.c``). Then a supervisor keeps a pager alive (:mod:`~imagefs.restore.pager_supervisor`).

    imagefs restore            QEMU (or any VMM that connects)
    ├── pager                  userfaultfd, and the state if it is ours
    └── QEMU, if it is ours
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from imagefs.errors import ImagefsError
from imagefs.image.geometry import PAGE_SIZE
from imagefs.pager import Status
from imagefs.restore.child import Vmm, private_directory, started
from imagefs.restore.door import Request
from imagefs.restore.handshake import Handover, Listener
from imagefs.restore.mapping_qemu import MappingQemu, mapping_obstacle, mapping_qemu, shim_obstacle
from imagefs.restore.mountpoint import MountedImage, RestoreImage
from imagefs.restore.pager_sources import page_count
from imagefs.restore.pager_supervisor import PagerSupervisor
from imagefs.restore.reattach import Survivor
from imagefs.restore.shared_state import SharedState
from imagefs.restore.userfaultfd import userfaultfd_obstacle

log = logging.getLogger(__name__)

SOCKET = "IMAGEFS_PAGER"
STATE = "IMAGEFS_PAGER_STATE"
"""What the shim is told: where we listen, and the number of the state's file."""


class PagerDoor:
    name = "pager"
    summary = "a process of imagefs brings the pages of QEMU's memory, and can be killed without harm"

    def obstacle(self, request: Request) -> str | None:
        return mapping_obstacle(request) or userfaultfd_obstacle() or shim_obstacle()

    def run(self, request: Request) -> int:
        """QEMU's exit status, negative for a signal's."""
        image = request.image
        page_count(image)
        qemu = mapping_qemu(request, is_paged=True)
        with ExitStack() as stack:
            # Gone once QEMU has connected, so that nothing is left if this process is killed.
            place = stack.enter_context(ExitStack())
            socket = request.socket or place.enter_context(private_directory()) / "pager"
            if request.print_only:
                print(qemu.for_shell({SOCKET: str(socket)}))
                log.warning(
                    "first start its pager: imagefs restore %s --door pager --socket %s", image.mountpoint, socket
                )
                return 0
            listener = place.enter_context(Listener(socket))
            state = stack.enter_context(SharedState.anonymous(page_count(image)))
            vmm = stack.enter_context(_start(qemu, socket, state))
            handover = listener.wait(image.ram_bytes, vmm)
            place.close()
            if handover is not None:
                stack.callback(handover.close)
                _supervise(image, vmm, handover, state)
            # If not, QEMU has ended before it needed memory; it has said itself why.
            return vmm.wait()


DOOR = PagerDoor()


def _start(qemu: MappingQemu, socket: Path, state: SharedState) -> AbstractContextManager[Vmm]:
    environment = {**qemu.environment, SOCKET: str(socket), STATE: str(state.fd)}
    return started(qemu.program, qemu.arguments, pass_fds=[state.fd], environment=environment)


def _supervise(image: RestoreImage, vmm: Vmm, handover: Handover, state: SharedState) -> None:
    try:
        PagerSupervisor(image, handover, state).run()
    except ImagefsError:
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
            handover = listener.wait(pages * PAGE_SIZE)
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
