"""The registry of doors, and the choice among them. Each is a module with an object ``DOOR`` that fits Door.

A guest waits while we start, so a door's module is imported only when it is looked at.
"""

from __future__ import annotations

import logging
from importlib import import_module

from imagefs.errors import RestoreError, UsageError
from imagefs.restore.door import Door, Request

log = logging.getLogger(__name__)

AUTO = "auto"

DOORS = ("pager", "mmap", "postcopy")
"""All there are, in the order in which ``auto`` tries them.

pager first: its faults are the fastest, and whoever dies (the pager, the mount's daemon, this command) the guest waits
and can go on. It needs the right to use userfaultfd. mmap needs none, and reads nothing that the guest does not touch,
but the mount until QEMU ends. postcopy brings all of the memory across in any case."""


def door_names() -> list[str]:
    """What ``--door`` takes."""
    return [AUTO, *DOORS]


def door(name: str) -> Door:
    """The door of that name; UsageError where there is none."""
    if name not in DOORS:
        raise UsageError(f"--door {name}: unknown; known are {', '.join(door_names())}")
    found: Door = import_module(f"imagefs.restore.{name}_door").DOOR
    return found


def choose_door(name: str, request: Request) -> Door:
    """The door of that name, or for ``auto`` the best that is possible; says in the log which and why.

    Raises UsageError for an unknown name, RestoreError where it (or, for ``auto``, any) cannot be used.
    """
    if name == AUTO:
        reasons: list[str] = []
        for number, each in enumerate(DOORS):
            tried = door(each)
            reason = tried.obstacle(request)
            if reason is None:
                log.info("door %s: %s%s", each, tried.summary, "".join(f"; not {other}" for other in reasons))
                if others := DOORS[number + 1 :]:
                    log.info("it is tried before %s, which --door takes by name", ", ".join(others))
                return tried
            reasons.append(f"{each}: {reason}")
        raise RestoreError("no door is possible here: " + "; ".join(reasons))
    chosen = door(name)
    reason = chosen.obstacle(request)
    if reason is not None:
        raise RestoreError(f"door {name}: {reason}")
    return chosen
