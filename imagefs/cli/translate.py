"""``imagefs translate MOUNTPOINT VADDR``."""

from __future__ import annotations

import argparse

from imagefs.cli.guest import add_vcpu_options, count, mounted_guest
from imagefs.errors import NotMappedError
from imagefs.image.translate import Step, Translation

DESCRIPTION = """\
Translate an address of a mounted guest as its MMU would, through the page tables in
MOUNTPOINT/memory. Prints the guest-physical address, the size of the page, what may be
done with it (r, w, x), who may do it (user, supervisor), and its flags:

    0x3ba17a0b 2MiB r-x supervisor accessed dirty global

With -v also the entry of each level on the way. An address that is not mapped gets exit
status 1 and the level at which the walk ends.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    add_vcpu_options(parser)
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="where mount.imagefs has mounted an image")
    parser.add_argument("address", metavar="VADDR", type=count, help="a guest-virtual address: 0xffffffff81000000")


def run(args: argparse.Namespace) -> int:
    with mounted_guest(args.mountpoint) as guest:
        found = guest.address_space(args).translate(args.address)
    if args.verbose:
        for step in found.steps:
            print(_step_text(step))
    check_mapped(found)
    print(_text(found))
    return 0


def check_mapped(found: Translation) -> None:
    """NotMappedError with the place at which the walk ended."""
    if not found.page_size:
        where = f": {_step_text(found.steps[-1])}" if found.steps else ""
        raise NotMappedError(f"{found.virtual:#x}: {found.fault}{where}")


def _text(found: Translation) -> str:
    if not found.steps:
        return f"{found.physical:#x}: paging is off"
    size = f"{found.page_size >> 20}MiB" if found.page_size >> 20 else f"{found.page_size >> 10}KiB"
    rights = f"r{'w' if found.writable else '-'}{'x' if found.executable else '-'}"
    return " ".join([f"{found.physical:#x}", size, rights, "user" if found.user else "supervisor", *found.flags])


def _step_text(step: Step) -> str:
    return f"{step.kind}[{step.index}] at {step.address:#x}: {step.entry:#018x}"
