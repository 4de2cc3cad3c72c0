"""The door *mmap*: QEMU maps the mount's ``memory`` as its guest RAM, and becomes this process.

The guest's writes go to private pages of QEMU's. A preload shim (``native/preload.c``) keeps QEMU's request for huge
pages from turning each touch into 2 MiB across the link. If the mount's daemon dies, so does QEMU, by SIGBUS.
"""

from __future__ import annotations

import os
import signal

from imagefs.errors import RestoreError
from imagefs.restore.door import Request
from imagefs.restore.mapping_qemu import mapping_obstacle, mapping_qemu


class MmapDoor:
    name = "mmap"
    summary = "QEMU maps the file 'memory' of the mount"

    def obstacle(self, request: Request) -> str | None:
        return mapping_obstacle(request)

    def run(self, request: Request) -> int:
        """Does not return but for ``print_only``: QEMU takes this process over, so its exit status is its own."""
        qemu = mapping_qemu(request)
        if request.print_only:
            print(qemu.for_shell())
            return 0
        # Python ignores SIGPIPE, and what is ignored stays so across exec, also in QEMU's children.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        try:
            os.execve(qemu.program, qemu.arguments, {**os.environ, **qemu.environment})
        except OSError as error:
            raise RestoreError(f"{qemu.program}: {error.strerror}") from error


DOOR = MmapDoor()
