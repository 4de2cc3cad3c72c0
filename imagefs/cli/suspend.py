"""``imagefs suspend --qmp SOCKET STORE/NAME``."""

from __future__ import annotations

import argparse
from pathlib import Path

from imagefs.cli.signals import signals_as_exceptions
from imagefs.cli.split import split_stream
from imagefs.restore.suspend import Afterwards, suspended

DESCRIPTION = """\
Suspend the guest of a running QEMU, and split it into the image STORE/NAME.

    imagefs suspend --qmp /run/vm1.qmp store/vm1

QEMU must have been started with a QMP socket that no one else is connected to:
-qmp unix:/run/vm1.qmp,server=on,wait=off. Where the guest's RAM is a shared file on this
host (memory-backend-file,share=on) the file is split directly, otherwise QEMU sends its
pages.

The guest stays paused afterwards ('cont' in QEMU's monitor lets it go on). If anything
fails, it goes on as if nothing had happened.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.add_argument("--qmp", metavar="SOCKET", type=Path, required=True, help="QEMU's QMP socket")
    afterwards = parser.add_mutually_exclusive_group()
    afterwards.add_argument(
        "--resume",
        action="store_const",
        dest="afterwards",
        const=Afterwards.RESUME,
        default=Afterwards.STAY,
        help="let the guest go on as soon as its memory has been read",
    )
    afterwards.add_argument(
        "--quit",
        action="store_const",
        dest="afterwards",
        const=Afterwards.QUIT,
        help="end QEMU once the image is stored",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    parser.add_argument("target", metavar="STORE/NAME", help="where the image goes: a directory and a name in it")


def run(args: argparse.Namespace) -> int:
    # The guest must not be left standing.
    with signals_as_exceptions(), suspended(args.qmp, args.afterwards) as guest:
        split_stream(guest.stream, args.target, memory_files=guest.memory_files, format=None, quiet=args.quiet)
    return 0
