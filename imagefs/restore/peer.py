"""The VMM whose memory is paged, which need not be a child of ours."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from pathlib import Path

SO_PEERPIDFD = 77
"""socket(7), Linux 6.5: no other process can have got the number meanwhile."""


class Peer:
    """A process, watched by a pidfd, or by a connection of its where it has no number here. Ours to close."""

    def __init__(self, pid: int, pidfd: int | None, connection: socket.socket | None = None) -> None:
        """``pid`` is 0 for a process of another PID namespace. At least one of the others is there."""
        self.pid = pid
        self._pidfd = pidfd
        self._connection = connection

    @classmethod
    def of_connection(cls, connection: socket.socket) -> Peer:
        """Takes the connection over."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        pidfd = None
        with contextlib.suppress(OSError):
            pidfd = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        if pidfd is None and pid:
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
        return cls(pid, pidfd, connection)

    def __str__(self) -> str:
        return f"process {self.pid}" if self.pid else "a process of another PID namespace"

    def fileno(self) -> int:
        """Readable once it has ended. Its hangup alone may come from a VMM that lives, and closed the connection."""
        if self._pidfd is not None:
            return self._pidfd
        assert self._connection is not None
        return self._connection.fileno()

    def kill(self) -> bool:
        """Whether that is possible. A VMM that waits for a page takes no gentler signal."""
        if self._pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return True

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def is_userfaultfd(link: str) -> bool:
    """Of a name below /proc/PID/fd."""
    try:
        return os.readlink(link) == "anon_inode:[userfaultfd]"
    except OSError:
        return False


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat: with the number, it tells a process from a later one. None where there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None
