"""``scripts/simulate``: which pages to fetch before a guest asks, tried offline over recordings of real guests.

    scripts/simulate record DIR [GUEST …]   boot, suspend and resume the guests, and keep images and traces in DIR
    scripts/simulate run DIR [--json]       how long each policy takes over each link
    scripts/simulate chunks DIR [--json]    the same for what a mount does, by the size of the windows

A recording is made by the door mmap from a full local cache, page by page; see support/simulate/record.py. The model of
the link and what it leaves out is in support/simulate/model.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from imagefs.errors import ImagefsError
from support.commands import CommandFailedError
from support.debian import GuestError
from support.mounts import MountFailedError
from support.simulate.guests import load_guest
from support.simulate.model import Link, Outcome, Policy, simulate
from support.simulate.policies import Combined, kept, policies
from support.simulate.record import GUESTS, TRACE
from support.vm import VmError

LINKS = (Link(10, 150), Link(100, 40), Link(1000, 10), Link(10_000, 0.2))
HEAD_START = 0.5
"""Seconds from the mount to the guest's first touch: QEMU's start."""

WINDOW_PAGES = (8, 16, 32, 64, 128)
HOST_SECONDS = 0.001
"""What a touch that is fetched over loopback takes (`scripts/bench fault`)."""

Row = tuple[str, str, Link, Outcome]


def main(arguments: Sequence[str] | None = None) -> int:
    summary, description = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="scripts/simulate",
        description=f"{summary}\n\n{description}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    record = commands.add_parser("record", help="make recordings")
    record.add_argument("directory", metavar="DIR", type=Path)
    record.add_argument("guests", metavar="GUEST", nargs="*", help=", ".join(GUESTS))
    run = commands.add_parser("run", help="simulate policies")
    chunks = commands.add_parser("chunks", help="simulate sizes of windows")
    for command in (run, chunks):
        command.add_argument("directory", metavar="DIR", type=Path)
        command.add_argument("--head-start", type=float, default=HEAD_START, metavar="SECONDS", help="to first touch")
        command.add_argument("--json", action="store_true", help="a JSON line for each figure")
    args = parser.parse_args(arguments)
    try:
        if args.command == "record":
            return _record(parser, args)
        return _run(parser, args, simulated if args.command == "run" else simulated_chunks)
    except (ImagefsError, GuestError, CommandFailedError, MountFailedError, VmError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 1


def _record(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    unknown = set(args.guests) - set(GUESTS)
    if unknown:
        parser.error(f"no such guest: {', '.join(sorted(unknown))}; there are {', '.join(GUESTS)}")
    for name in args.guests or GUESTS:
        directory = args.directory / name
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            parser.error(f"{directory}: {error.strerror}")
        GUESTS[name](directory, _step)
    return 0


def _run(
    parser: argparse.ArgumentParser, args: argparse.Namespace, simulate_all: Callable[[Path, float], Iterator[Row]]
) -> int:
    recordings = sorted(path.parent for path in args.directory.glob(f"*/{TRACE}"))
    if not recordings:
        parser.error(f"{args.directory}: no recordings; make some with scripts/simulate record {args.directory}")
    for directory in recordings:
        rows = list(simulate_all(directory, args.head_start))
        if args.json:
            for guest, policy, link, outcome in rows:
                print(json.dumps({"guest": guest, "policy": policy, "link": link.name, **asdict(outcome)}))
        else:
            Console(width=160).print(table(directory.name, rows))
    return 0


def simulated(directory: Path, head_start: float) -> Iterator[Row]:
    """Every policy over every link."""
    guest = load_guest(directory)
    for name, make in policies(guest):
        for link in LINKS:
            yield guest.name, name, link, simulate(guest.touches, guest.sizes, make(), link, head_start=head_start)


def simulated_chunks(directory: Path, head_start: float) -> Iterator[Row]:
    """What a mount does, with windows of each size, without a recording and by demand alone, over every link."""
    for pages in WINDOW_PAGES:
        guest = load_guest(directory, pages)
        stored = sum(guest.sizes.values()) / 1e6
        ways: dict[str, Callable[[Link], Policy]] = {
            "demand only": lambda _: Combined(),
            "as mounted": partial(kept, guest),
        }
        for name, policy in ways.items():
            for link in LINKS:
                outcome = simulate(
                    guest.touches, guest.sizes, policy(link), link, head_start=head_start, host_seconds=HOST_SECONDS
                )
                yield guest.name, f"{pages * 4} KiB, {stored:.1f} MB, {name}", link, outcome


def table(name: str, rows: Sequence[Row]) -> Table:
    out = Table(title=f"{name}: seconds to the last touch, touches that waited, MB fetched until then")
    out.add_column("policy")
    for link in LINKS:
        out.add_column(link.name, justify="right")
    for at in range(0, len(rows), len(LINKS)):
        outcomes = [row[3] for row in rows[at : at + len(LINKS)]]
        cells = (f"{o.seconds:.2f} s  {o.waits:3}  {o.fetched / 1e6:4.1f}" for o in outcomes)
        out.add_row(rows[at][1], *cells)
    return out


@contextmanager
def _step(text: str) -> Iterator[None]:
    begun = time.monotonic()
    print(f"{text} …", file=sys.stderr, flush=True)
    yield
    print(f"  {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
