"""``imagefs restore MOUNTPOINT -- qemu-system-x86_64 ARGS…``."""

from __future__ import annotations

import argparse
import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagefs.errors import UsageError
from imagefs.restore.door import Request
from imagefs.restore.doors import AUTO, choose_door, door_names
from imagefs.restore.mountpoint import read_mountpoint
from imagefs.restore.postcopy_door import recover_guest

DESCRIPTION = """\
Resume the guest whose image is mounted at MOUNTPOINT: it runs at once, and its memory
arrives as it touches it.

    imagefs restore /mnt/vm1 -- qemu-system-x86_64 -m 512M -nographic ...

Give the command line with which the guest was first started. What a restore needs is put
in by itself: the memory backend over MOUNTPOINT/memory (in place of one that is there), the
image's machine type where the command line names none or only 'pc' or 'q35', -m and -smp
where they are missing, and -incoming. A machine, a size of RAM or a number of CPUs that is
not the image's is refused. Disks must be as they were when the guest was suspended.

Signals and exit status are QEMU's own. By the door mmap QEMU takes the place of this command; by
the door postcopy it is the command's child, and the mount is no longer needed once all pages have
come. The guest goes on where it stopped, unless -S is among QEMU's arguments.

    imagefs restore /mnt/vm1 --recover --qmp SOCKET

sends the rest of the pages to a QEMU that was started by the door postcopy, and whose restore
command was killed.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.usage = (
        "imagefs restore MOUNTPOINT [--door DOOR] [--print] -- QEMU ARGS...\n"
        "       imagefs restore MOUNTPOINT --recover --qmp SOCKET"
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", type=Path, help="where the image is mounted")
    parser.add_argument(
        "--door",
        choices=door_names(),
        default=AUTO,
        help="how the memory gets into QEMU; auto takes the best that is possible here (default: %(default)s)",
    )
    parser.add_argument(
        "--print", action="store_true", dest="print_only", help="print the command that would be run, for a shell"
    )
    parser.add_argument(
        "--recover",
        action=_Recover,
        help="be the new source of the pages for a QEMU that lost its own (door postcopy)",
    )
    parser.add_argument(
        "--qmp", metavar="SOCKET", type=Path, help="with --recover: that QEMU's monitor (-qmp unix:SOCKET)"
    )
    # Everything from the first positional on, so that QEMU's options are left alone, also without the "--".
    parser.add_argument("vmm", metavar="QEMU ARGS...", nargs=argparse.PARSER, help="the QEMU command line")


class _Recover(argparse.Action):
    """A flag with which there is no QEMU command line."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, **options)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        setattr(namespace, self.dest, True)
        for action in parser._actions:
            if action.dest == "vmm":
                action.required = False


def run(args: argparse.Namespace) -> int:
    image = read_mountpoint(args.mountpoint)
    if args.recover or args.qmp:
        if not (args.recover and args.qmp) or args.vmm:
            raise UsageError("--recover and --qmp SOCKET belong together, and QEMU runs already: no command line")
        return recover_guest(image, args.qmp)
    command = args.vmm[1:] if args.vmm[0] == "--" else args.vmm
    request = Request(image, command, args.print_only)
    status = choose_door(args.door, request).run(request)
    if status < 0:
        _end_by(signal.Signals(-status))
    return status


def _end_by(number: signal.Signals) -> None:
    """As QEMU ended, so that whoever waits for us sees the same."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
