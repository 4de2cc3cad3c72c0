"""The registry of doors, and the choice among them. Each is a module with an object that fits Door."""

from __future__ import annotations

import logging

from imagefs.errors import RestoreError, UsageError
from imagefs.restore import mmap_door, pager_door, postcopy_door
from imagefs.restore.door import Door, Request

log = logging.getLogger(__name__)

AUTO = "auto"

DOORS: tuple[Door, ...] = (pager_door.DOOR, mmap_door.DOOR, postcopy_door.DOOR)
"""All there are, in the order in which ``auto`` tries them.

pager first: its faults are the fastest, and whoever dies (the pager, the mount's daemon, this command) the guest waits
and can go on. It needs the right to use userfaultfd. mmap needs none, and reads nothing that the guest does not touch,
but the mount until QEMU ends. postcopy brings all of the memory across in any case."""


def door_names() -> list[str]:
    """What ``--door`` takes."""
    return [AUTO, *(door.name for door in DOORS)]


def choose_door(name: str, request: Request) -> Door:
    """The door of that name, or for ``auto`` the best that is possible; says in the log which and why.

    Raises UsageError for an unknown name, RestoreError where it (or, for ``auto``, any) cannot be used.
    """
    if name == AUTO:
        reasons: list[str] = []
        for door in DOORS:
            reason = door.obstacle(request)
            if reason is None:
                log.info("door %s: %s%s", door.name, door.summary, "".join(f"; not {each}" for each in reasons))
                others = [other.name for other in DOORS[DOORS.index(door) + 1 :]]
                if others:
                    log.info("it is tried before %s, which --door takes by name", ", ".join(others))
                return door
            reasons.append(f"{door.name}: {reason}")
        raise RestoreError("no door is possible here: " + "; ".join(reasons))
    for door in DOORS:
        if door.name == name:
            reason = door.obstacle(request)
            if reason is not None:
                raise RestoreError(f"door {name}: {reason}")
            return door
    raise UsageError(f"--door {name}: unknown; known are {', '.join(door_names())}")
