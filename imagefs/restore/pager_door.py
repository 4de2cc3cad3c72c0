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
import os
from contextlib import ExitStack

from imagefs.restore.child import private_directory, started
from imagefs.restore.door import Request
from imagefs.restore.listening import Listener
from imagefs.restore.mapping_qemu import mapping_obstacle, mapping_qemu, shim_obstacle
from imagefs.restore.shim import SOCKET, STATE, STATE_NAME
from imagefs.restore.userfaultfd import userfaultfd_obstacle

log = logging.getLogger(__name__)


class PagerDoor:
    name = "pager"
    summary = "a process of imagefs brings the pages of QEMU's memory, and can be killed without harm"

    def obstacle(self, request: Request) -> str | None:
        return mapping_obstacle(request) or userfaultfd_obstacle() or shim_obstacle()

    def run(self, request: Request) -> int:
        """QEMU's exit status, negative for a signal's."""
        image = request.image
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
            state = os.memfd_create(STATE_NAME, os.MFD_CLOEXEC)
            stack.callback(os.close, state)
            environment = {**qemu.environment, SOCKET: str(socket), STATE: str(state)}
            vmm = stack.enter_context(started(qemu.program, qemu.arguments, pass_fds=[state], environment=environment))
            # QEMU starts meanwhile.
            from imagefs.restore.pager_service import serve_vmm

            serve_vmm(image, vmm, listener, state, place.close)
            return vmm.wait()


DOOR = PagerDoor()
