"""What a door is: one way to bring a guest's memory from a mountpoint to a VMM."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from imagefs.errors import UsageError
from imagefs.restore.mountpoint import RestoreImage


class Request(NamedTuple):
    """What the user asked for."""

    image: RestoreImage
    command: Sequence[str]
    """The VMM's command line, program first."""
    print_only: bool = False
    """Print what would be run, and run nothing."""
    socket: Path | None = None
    """Where the door pager listens; it finds a place by itself."""


class Door(Protocol):
    """One way to bring memory from a mountpoint to a VMM."""

    name: str
    """As ``--door`` takes it."""
    summary: str

    def obstacle(self, request: Request) -> str | None:
        """Why this door cannot be used here, in words for the user; None if it can."""

    def run(self, request: Request) -> int:
        """Start the VMM; exit status, for doors that live as long as it does,
        negative for the number of the signal that ended it. Raises RestoreError and UsageError."""


def find_program(request: Request) -> str:
    """Path of the VMM; UsageError where the command line is missing, or names no program."""
    if not request.command:
        raise UsageError("the QEMU command line is missing: imagefs restore MOUNTPOINT -- qemu-system-x86_64 ARGS…")
    name = request.command[0]
    program = shutil.which(name)
    if program is None:
        raise UsageError(f"{name}: no such program")
    return program
