"""Find the file that is a running QEMU's guest RAM, if it is one that can be read in QEMU's place."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from imagefs.restore.qmp import Qmp, QmpError

log = logging.getLogger(__name__)

_BACKEND = "memory-backend-file"


def shared_ram_file(qmp: Qmp) -> Path | None:
    """The RAM file of a guest whose only memory is one ``memory-backend-file`` with ``share=on``; None otherwise.

    None as well where this process cannot see for sure that the file at that path is the one that QEMU has mapped:
    another host or container, a file replaced since, no permission to look. Then the pages come from QEMU itself.
    """
    backends = qmp.execute("query-memdev")
    if len(backends) != 1 or not backends[0].get("share") or "id" not in backends[0]:
        return None
    where = f"/objects/{backends[0]['id']}"
    try:
        if qmp.execute("qom-get", {"path": where, "property": "type"}) != _BACKEND:
            return None
        name = str(qmp.execute("qom-get", {"path": where, "property": "mem-path"}))
    except QmpError as error:
        log.info("guest RAM comes through QEMU: %s", error)
        return None
    pid = qmp.peer_pid
    if not pid:
        return None
    # An absolute name stays what it is.
    path = Path(f"/proc/{pid}/cwd") / name
    try:
        status = path.stat()
        mapped = _is_mapped_shared(pid, status)
    except OSError as error:
        log.info("guest RAM comes through QEMU: %s: %s", path, error.strerror)
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_size != backends[0]["size"] or not mapped:
        log.info("guest RAM comes through QEMU: %s is not the file that it has mapped", path)
        return None
    return path


def _is_mapped_shared(pid: int, status: os.stat_result) -> bool:
    """Whether a process has the file mapped, shared and from its start. Lines as in proc(5), /proc/pid/maps."""
    wanted = (f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino))
    for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
        _, permissions, offset, device, inode, *_ = line.split(maxsplit=5)
        if (device, inode) == wanted and permissions.endswith("s") and int(offset, 16) == 0:
            return True
    return False
