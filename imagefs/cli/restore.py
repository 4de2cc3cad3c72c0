"""``imagefs restore MOUNTPOINT -- qemu-system-x86_64 ARGS…``."""

from __future__ import annotations

import argparse
import os
import resource
import signal
from pathlib import Path

from imagefs.cli.signals import signals_as_exceptions
from imagefs.errors import UsageError
from imagefs.restore.door import Request
from imagefs.restore.doors import AUTO, choose_door, door_names
from imagefs.restore.mountpoint import read_memory, read_mountpoint

PAGER = "pager"

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
the doors pager and postcopy it is the command's child. The guest goes on where it stopped, unless
-S is among QEMU's arguments.

    imagefs restore /mnt/vm1 --socket PATH

serves any VMM that hands its memory over through a socket, as Firecracker does ("backend_type":
"Uffd"). If such a command or that of a QEMU by the door pager was killed, then

    imagefs restore /mnt/vm1 --reattach --socket PATH
    imagefs restore /mnt/vm1 --reattach --pid QEMU

take over; the guest waits meanwhile. By the door postcopy that is

    imagefs restore /mnt/vm1 --recover --qmp SOCKET
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.usage = (
        "imagefs restore MOUNTPOINT [--door DOOR] [--print] -- QEMU ARGS...\n"
        "       imagefs restore MOUNTPOINT [--door pager] --socket PATH\n"
        "       imagefs restore MOUNTPOINT --reattach --socket PATH\n"
        "       imagefs restore MOUNTPOINT --reattach --pid QEMU\n"
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
        "--socket", action=_WithoutVmm, metavar="PATH", type=Path, help="listen there for the VMM's memory (door pager)"
    )
    parser.add_argument(
        "--reattach",
        action=_WithoutVmm,
        nargs=0,
        help="bring the pages for a VMM that lost its pager and the command that kept it alive (door pager)",
    )
    parser.add_argument("--pid", metavar="QEMU", type=int, help="with --reattach: the process of that QEMU")
    parser.add_argument(
        "--recover",
        action=_WithoutVmm,
        nargs=0,
        help="be the new source of the pages for a QEMU that lost its own (door postcopy)",
    )
    parser.add_argument(
        "--qmp", metavar="SOCKET", type=Path, help="with --recover: that QEMU's monitor (-qmp unix:SOCKET)"
    )
    # Everything from the first positional on, so that QEMU's options are left alone, also without the "--".
    parser.add_argument("vmm", metavar="QEMU ARGS...", nargs=argparse.PARSER, help="the QEMU command line")


class _WithoutVmm(argparse.Action):
    """An option with which there need not be a QEMU command line; a flag where it takes no values."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, *_: object
    ) -> None:
        setattr(namespace, self.dest, values or True)
        for action in parser._actions:
            if action.dest == "vmm":
                action.required = False


def run(args: argparse.Namespace) -> int:
    if args.recover or args.qmp:
        if not (args.recover and args.qmp) or args.vmm or args.reattach:
            raise UsageError("--recover and --qmp SOCKET belong together, and QEMU runs already: no command line")
        from imagefs.restore.postcopy_door import recover_guest

        return recover_guest(read_mountpoint(args.mountpoint), args.qmp)
    if args.reattach or args.pid is not None:
        if not args.reattach or args.vmm or (args.pid is None) == (args.socket is None):
            raise UsageError("--reattach goes with either --socket PATH or --pid QEMU, and no command line")
        from imagefs.restore.pager_service import reattach
        from imagefs.restore.reattach import find_by_pid, find_by_socket

        image = read_memory(args.mountpoint)
        with signals_as_exceptions():
            return reattach(image, find_by_socket(args.socket) if args.socket else find_by_pid(args.pid))
    if args.socket and args.door not in (AUTO, PAGER):
        raise UsageError(f"--socket is for the door {PAGER}, not {args.door}")
    if not args.vmm:
        if args.print_only:
            raise UsageError("--print prints QEMU's command line: give one")
        from imagefs.restore.pager_service import serve_socket

        with signals_as_exceptions():
            return serve_socket(read_memory(args.mountpoint), args.socket)
    command = args.vmm[1:] if args.vmm[0] == "--" else args.vmm
    request = Request(read_mountpoint(args.mountpoint), command, args.print_only, args.socket)
    door = choose_door(PAGER if args.socket else args.door, request)
    status = door.run(request)
    if status < 0:
        _end_by(signal.Signals(-status))
    return status


def _end_by(number: signal.Signals) -> None:
    """As QEMU ended, so that whoever waits for us sees the same."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
