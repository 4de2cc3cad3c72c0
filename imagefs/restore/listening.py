"""The socket at which a VMM hands its memory over; how it does so is in :mod:`~imagefs.restore.handshake`.

A guest waits while we start: this has no part of what is needed only once the VMM has something to say.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from imagefs.errors import UsageError

MOST_CLIENTS = 16
LONGEST_PATH = 107


class Listener:
    """The socket at ``path``, owner-only, until it is closed. UsageError where it cannot be made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Under its name it is there only once it can be connected to: a VMM may be started as soon as it appears.
        early = path.with_name(f".{os.getpid()}")
        if max(len(os.fsencode(each)) for each in (path, early)) > LONGEST_PATH:
            raise UsageError(f"{path}: the name of a socket has at most {LONGEST_PATH} bytes")
        _make_room(path)
        self.socket = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        try:
            self.socket.bind(str(early))
            self.socket.listen(MOST_CLIENTS)
            self.socket.setblocking(False)
            early.rename(path)
        except OSError as error:
            self.socket.close()
            with contextlib.suppress(OSError):
                early.unlink()
            raise UsageError(f"{path}: {error.strerror}") from error
        finally:
            os.umask(mask)
        self._inode = path.stat().st_ino

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Twice does no harm."""
        if self.socket.fileno() >= 0:
            self.socket.close()
            with contextlib.suppress(OSError):
                if self.path.lstat().st_ino == self._inode:
                    self.path.unlink()


def _make_room(path: Path) -> None:
    """Remove a socket that nobody listens on. UsageError where something else is there."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if not stat.S_ISSOCK(kind):
        raise UsageError(f"{path} is there, and is no socket: give another name, or remove it yourself")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
    raise UsageError(f"{path}: another process listens there")
