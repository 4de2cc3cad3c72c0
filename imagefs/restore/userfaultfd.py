"""Whether this process, and what it starts, may catch faults of its own kernel code (userfaultfd(2))."""

from __future__ import annotations

import os
from pathlib import Path

SYSCTL = Path("proc/sys/vm/unprivileged_userfaultfd")
DEVICE = Path("dev/userfaultfd")
_CAP_SYS_PTRACE = 19

ADVICE = (
    "allow it with sysctl vm.unprivileged_userfaultfd=1, or give QEMU the capability CAP_SYS_PTRACE (root has it), or "
    "let its user read and write /dev/userfaultfd (which QEMU itself, by the door postcopy, uses from version 8.1 on)"
)


def userfaultfd_obstacle(root: Path = Path("/")) -> str | None:
    """Why it is not permitted, and what to do, in words for the user; None where it is, or where it does not show.

    ``root`` is where /proc and /dev are.
    """
    try:
        unprivileged = (root / SYSCTL).read_text().strip()
    except OSError:
        if not (root / "proc/self/status").exists():
            return None
        return "this kernel has no userfaultfd (CONFIG_USERFAULTFD, Linux 5.2 or newer)"
    if unprivileged != "0" or os.access(root / DEVICE, os.R_OK | os.W_OK) or _has_capability(root):
        return None
    return f"userfaultfd is not permitted to this user: {ADVICE}"


def _has_capability(root: Path) -> bool:
    for line in (root / "proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> _CAP_SYS_PTRACE & 1)
    return False
