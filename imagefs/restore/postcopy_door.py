"""The door *postcopy*: QEMU receives the guest by a postcopy migration of which we are the source.

The device state comes first, and the guest runs; each page that it touches and that has not come is asked for, all
others follow. In the end QEMU has all of its memory and needs neither us nor the mount. Nothing is mapped: guest RAM is
whatever the command line says, anonymous if it says nothing.
"""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path

from imagefs.errors import MountError, RestoreError
from imagefs.restore.door import Request, find_program
from imagefs.restore.incoming import runnable
from imagefs.restore.migration_stream import StateParts, begin, take_apart
from imagefs.restore.mountpoint import RestoreImage
from imagefs.restore.qemu_command import Command, receiving_command
from imagefs.restore.qemu_machine import list_machines
from imagefs.restore.supervisor import Supervisor, recover
from imagefs.restore.userfaultfd import userfaultfd_obstacle

log = logging.getLogger(__name__)


class PostcopyDoor:
    name = "postcopy"
    summary = "QEMU receives the guest's pages as in a postcopy migration, and runs on alone once it has all"

    def obstacle(self, request: Request) -> str | None:
        if not os.access(request.image.memory, os.R_OK):
            return f"{request.image.memory} cannot be read by this user"
        return userfaultfd_obstacle()

    def run(self, request: Request) -> int:
        """QEMU's exit status, negative for a signal's."""
        image = request.image
        program = find_program(request)
        parts, runs = _state(image)
        begin(parts, image.ram_block)
        command = receiving_command(request.command, image, lambda: list_machines(program), stopped=not runs)
        for note in command.notes:
            log.info("%s", note)
        if not runs:
            log.warning("%s: the guest was saved in a state that it stays in: 'cont' lets it go on", image.mountpoint)
        if request.print_only:
            print(shlex.join(command.arguments))
            log.warning("QEMU alone would wait: its source is this command, over a monitor that it adds")
            return 0
        return Supervisor(image, parts).run(program, lambda monitor: _with_monitor(command, monitor))


DOOR = PostcopyDoor()


def recover_guest(image: RestoreImage, qmp_path: Path) -> int:
    """Serve the guest behind a monitor that has lost its source, until QEMU has everything; exit status.

    UsageError where no QEMU listens, RestoreError where it waits for no source, or the connection breaks again.
    """
    if not recover(image, _state(image)[0], qmp_path):
        raise RestoreError(
            f"{qmp_path}: QEMU closed the connection before it had all pages; if it lives, do this again"
        )
    return 0


def _state(image: RestoreImage) -> tuple[StateParts, bool]:
    try:
        state, runs = runnable(image.state.read_bytes())
    except OSError as error:
        raise MountError(f"{image.state}: {error.strerror}") from error
    return take_apart(state), runs


def _with_monitor(command: Command, fd: int) -> list[str]:
    name = "imagefs-monitor"
    return [*command.arguments, "-chardev", f"socket,id={name},fd={fd}", "-mon", f"chardev={name},mode=control"]
