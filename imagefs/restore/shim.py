"""The preload shim (``native/preload.c``): where it is, and what a VMM that is started with it is told."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from imagefs.errors import RestoreError

MEMORY = "IMAGEFS_MEMORY"
"""The environment's variable for the file that stands for guest memory."""
SOCKET = "IMAGEFS_PAGER"
STATE = "IMAGEFS_PAGER_STATE"
"""Where a pager listens, and the number of the state's file."""
STATE_NAME = "imagefs-pager"
"""Of the memfd that holds a pager's state, in /proc/PID/fd."""


def preload_path() -> Path:
    """The shared object that a VMM is started with as LD_PRELOAD."""
    spec = find_spec("imagefs._preload")
    if spec is None or spec.origin is None:
        raise RestoreError(f"the preload library is not in {Path(__file__).parents[1]}: install imagefs again")
    return Path(spec.origin)
