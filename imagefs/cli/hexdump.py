"""``imagefs hexdump MOUNTPOINT (--phys|--virt) ADDR [LENGTH]``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from imagefs.cli.guest import MountedGuest, add_vcpu_options, count, mounted_guest
from imagefs.cli.translate import check_mapped
from imagefs.errors import NotMappedError
from imagefs.image.geometry import PAGE_SIZE

DESCRIPTION = """\
Show memory of a mounted guest in the form of hexdump -C. Only the pages that are shown
are read, and with --virt the page tables on the way to them.
"""

LINE = 16
DEFAULT_LENGTH = 256


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    space = parser.add_mutually_exclusive_group(required=True)
    space.add_argument("--phys", action="store_true", help="ADDR is guest-physical")
    space.add_argument("--virt", action="store_true", help="ADDR is guest-virtual")
    add_vcpu_options(parser)
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="where mount.imagefs has mounted an image")
    parser.add_argument("address", metavar="ADDR", type=count, help="where to begin")
    parser.add_argument(
        "length", metavar="LENGTH", type=count, nargs="?", default=DEFAULT_LENGTH, help="bytes (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    with mounted_guest(args.mountpoint) as guest:
        for line in dump_lines(args.address, _pieces(guest, args)):
            print(line)
    return 0


def _pieces(guest: MountedGuest, args: argparse.Namespace) -> Iterator[bytes]:
    """What is to be shown, a page or the part of one at a time."""
    space = guest.address_space(args) if args.virt else None
    geometry = guest.document.geometry
    address, end = args.address, args.address + args.length
    while address < end:
        physical = address
        if space is not None:
            found = space.translate(address)
            check_mapped(found)
            physical = found.physical
        page = geometry.page_of_pfn(physical // PAGE_SIZE)
        if page is None:
            raise NotMappedError(f"guest-physical {physical:#x} is not in the guest's RAM")
        inside = physical % PAGE_SIZE
        length = min(end - address, PAGE_SIZE - inside)
        yield guest.memory.read_at(page * PAGE_SIZE + inside, length)
        address += length


def dump_lines(address: int, pieces: Iterator[bytes]) -> Iterator[str]:
    """As ``hexdump -C`` prints them: equal lines once and a ``*``, the end's address last."""
    rest, last, starred = b"", None, False
    while True:
        piece = next(pieces, b"")
        rest += piece
        while len(rest) >= LINE or (rest and not piece):
            line, rest = rest[:LINE], rest[LINE:]
            if line != last:
                yield _line(address, line)
            elif not starred:
                yield "*"
            starred = line == last
            last = line
            address += len(line)
        if not piece:
            break
    if last is not None:
        yield f"{address:08x}"


def _line(address: int, data: bytes) -> str:
    left, right = data[:8].hex(" "), data[8:].hex(" ")
    text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in data)
    return f"{address:08x}  {left:23}  {right:23}  |{text}|"
