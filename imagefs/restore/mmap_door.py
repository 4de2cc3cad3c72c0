"""The door *mmap*: QEMU maps the mount's ``memory`` as its guest RAM, and becomes this process.

The guest's writes go to private pages of QEMU's. A preload shim (``native/preload.c``) keeps QEMU's request for huge
pages from turning each touch into 2 MiB across the link. If the mount's daemon dies, so does QEMU, by SIGBUS.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
from collections.abc import Mapping
from pathlib import Path

from imagefs.errors import RestoreError
from imagefs.native import preload_path
from imagefs.restore.door import Request, find_program
from imagefs.restore.incoming import incoming_of
from imagefs.restore.qemu_command import restore_command
from imagefs.restore.qemu_machine import list_machines

log = logging.getLogger(__name__)


class MmapDoor:
    name = "mmap"
    summary = "QEMU maps the file 'memory' of the mount"

    def obstacle(self, request: Request) -> str | None:
        if not os.access(request.image.memory, os.R_OK):
            return f"{request.image.memory} cannot be read by this user"
        return None

    def run(self, request: Request) -> int:
        """Does not return but for ``print_only``: QEMU takes this process over, so its exit status is its own."""
        image = request.image
        program = find_program(request)
        incoming = incoming_of(image.state)
        command = restore_command(request.command, image, incoming.value, lambda: list_machines(program))
        for note in command.notes:
            log.info("%s", note)
        if not incoming.runs:
            log.warning("%s: the guest was saved in a state that it stays in: 'cont' lets it go on", image.mountpoint)
        added = _environment(image.memory, os.environ)
        if request.print_only:
            print(
                " ".join(
                    [*(f"{name}={shlex.quote(value)}" for name, value in added.items()), shlex.join(command.arguments)]
                )
            )
            return 0
        # Python ignores SIGPIPE, and what is ignored stays so across exec, also in QEMU's children.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        try:
            os.execve(program, command.arguments, {**os.environ, **added})
        except OSError as error:
            raise RestoreError(f"{program}: {error.strerror}") from error


DOOR = MmapDoor()


def _environment(memory: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What QEMU's environment gets for the shim."""
    shim = str(preload_path())
    if set(shim) & set(" :"):
        log.warning("%s: ld.so takes no path with a space or colon, so the guest fetches more than it touches", shim)
        return {}
    preload = " ".join(filter(None, [shim, environment.get("LD_PRELOAD")]))
    return {"LD_PRELOAD": preload, "IMAGEFS_MEMORY": str(memory)}
