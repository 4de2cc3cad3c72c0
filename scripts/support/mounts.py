"""A mounted image, unmounted for certain when the context is left."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.uninterrupted import uninterrupted


class MountFailedError(Exception):
    """mount.imagefs said why."""


@contextmanager
def mounted(location: str, mountpoint: Path, options: str = "") -> Iterator[Path]:
    """``mount.imagefs location mountpoint -o options``, as a user calls it."""
    mountpoint.mkdir(exist_ok=True)
    try:
        _mount(["mount.imagefs", location, str(mountpoint), *(["-o", options] if options else [])])
        yield mountpoint
    finally:
        unmount(mountpoint)


def _mount(command: list[str]) -> None:
    # A session of its own: Ctrl-C in the terminal is for us, and mount.imagefs is told to end, not killed: killed it
    # could leave a daemon behind that is about to mount.
    process = None
    try:
        with uninterrupted():
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        _, said = process.communicate()
    except BaseException:
        with uninterrupted():
            if process is not None:
                process.terminate()
                process.communicate()
        raise
    if process.returncode:
        raise MountFailedError(f"{' '.join(command)}: {said.strip()}")


@uninterrupted()
def unmount(mountpoint: Path) -> None:
    """Plainly if possible; otherwise by force, which fails the reads of whoever still has it open, and lazily."""
    for how in ([], ["-f"], ["-l"]):
        if not os.path.ismount(mountpoint):
            return
        subprocess.run(["umount", *how, str(mountpoint)], capture_output=True, check=False, start_new_session=True)
