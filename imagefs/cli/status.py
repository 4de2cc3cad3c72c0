"""``imagefs status MOUNTPOINT``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from imagefs.cli.terminal import size_text
from imagefs.mount.status import read_status

SUMMARY = "show what a mount has fetched and is fetching"

DESCRIPTION = """\
Show how far the image mounted at MOUNTPOINT has arrived, what it has cost, and how
long reads had to wait. Everything comes from MOUNTPOINT/.imagefs/status.json.
"""

INTERVAL = 1.0
"""Seconds between looks with --watch."""
SHOWN_IN_FLIGHT = 5

Row = tuple[str, str]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="where mount.imagefs has mounted an image")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, one line a look with --watch")
    parser.add_argument("--watch", action="store_true", help="look every second, until all pages are here or Ctrl-C")


def run(args: argparse.Namespace) -> int:
    try:
        if sys.stdout is not None and sys.stdout.isatty() and not args.json:
            return _on_terminal(args.mountpoint, watch=args.watch)
        return _print(args)
    except KeyboardInterrupt:
        if not args.watch:
            raise
        return 128 + signal.SIGINT  # how one ends watching: nothing to complain of


def _print(args: argparse.Namespace) -> int:
    while True:
        status = read_status(args.mountpoint)
        if args.json:
            print(json.dumps(status, indent=None if args.watch else 2), flush=True)
        else:
            print("\n".join(f"{label + ':':12}{value}" for label, value in rows(args.mountpoint, status)), flush=True)
        if not args.watch or status["memory"]["complete"]:
            return 0
        time.sleep(INTERVAL)


def rows(mountpoint: str, status: Mapping[str, Any]) -> list[Row]:
    """What is shown, as label and text. Parts of the status that a mount does not have are left out."""
    mount, fetch, cache = status["mount"], status.get("fetch", {}), status.get("cache", {})
    options = mount["options"]
    patience = "hard" if options["hard"] else f"soft, {options['timeo']:g} s"
    shown = [
        ("image", str(status.get("source", "?"))),
        ("mounted", f"at {mountpoint} for {_duration(mount['uptime'])}, {patience}; daemon is process {mount['pid']}"),
        ("pages", _pages(status)),
    ]
    if cache:
        trouble = ", full" if cache.get("full") else ""
        shown.append(("cache", f"{cache.get('kind', '?')} {cache.get('path', '')}".rstrip() + trouble))
    working_set = status.get("working_set", {})
    if working_set.get("pages") or working_set.get("local_pages"):
        shown.append(("recorded", _working_set(working_set)))
    if fetch:
        requests, background = fetch["requests"], fetch["background_requests"]
        amount = size_text(fetch["payload_bytes"])
        shown += [
            ("fetched", f"{amount} in {requests - background} requests on demand, {background} in the background"),
            ("store", _store(fetch)),
            ("in flight", _in_flight(fetch)),
        ]
    shown.append(("reads", _reads(mount)))
    failed = sum(mount["errors"].values())
    if failed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in mount["errors"].items())
        shown.append(("failed", f"{kinds}; see the log"))
    return shown


def _pages(status: Mapping[str, Any]) -> str:
    pages, here = status["memory"]["pages"], status.get("cache", {}).get("pages_present")
    size = size_text(pages * status["memory"]["page_size"])
    if status["memory"]["complete"]:
        return f"all {pages} are here ({size})"
    if here is None:
        return f"{pages} ({size})"
    return f"{here} of {pages} are here ({here * 100 // max(pages, 1)} % of {size})"


def _working_set(found: Mapping[str, Any]) -> str:
    parts = []
    if found.get("pages"):
        amount = f"{size_text(found['bytes_received'])} of {size_text(found['bytes'])}"
        parts.append(f"{found['state']}: {found['pages_landed']} of {found['pages']} pages, {amount}")
    if found.get("local_pages"):
        parts.append(f"{found['local_pages']} pages recorded on this host")
    return "; ".join(parts)


def _store(fetch: Mapping[str, Any]) -> str:
    state = "answers" if fetch["store_answers"] else "does not answer; trying again"
    counts = [f"{fetch[kind]} {kind}" for kind in ("outages", "corrupt", "missing") if fetch.get(kind)]
    if fetch.get("hedged_requests"):
        counts.append(f"{fetch['hedged_requests']} asked twice")
    if fetch.get("round_trip_seconds"):
        counts.append(f"{_seconds(fetch['round_trip_seconds'])} round trip")
    if fetch.get("bytes_per_second"):
        counts.append(f"{size_text(fetch['bytes_per_second'])}/s")
    return "; ".join([state, *counts])


def _in_flight(fetch: Mapping[str, Any]) -> str:
    flying = [_request(request) for request in fetch["in_flight"]]
    queued = ", ".join(f"{count} {kind}" for kind, count in fetch["queued"].items() if count)
    shown = "; ".join(flying[:SHOWN_IN_FLIGHT]) + ("; …" if len(flying) > SHOWN_IN_FLIGHT else "")
    return f"{len(flying)}" + (f" ({shown})" if flying else "") + (f"; queued: {queued}" if queued else "")


def _request(request: Mapping[str, Any]) -> str:
    """``memory window 3 and 5 more, 160 KiB: touch, 2 waiting, 41 ms``"""
    more = f" and {request['chunks'] - 1} more" if request["chunks"] > 1 else ""
    waiting = f", {request['waiting']} waiting" if request["waiting"] else ""
    again = ", asked twice" if request["again"] else ""
    why = f"{request['why'].replace('_', ' ')}{waiting}{again}"
    return f"{request['what']}{more}, {size_text(request['bytes'])}: {why}, {_seconds(request['seconds'])}"


def _reads(mount: Mapping[str, Any]) -> str:
    text = f"{mount['requests'].get('read', 0)}, {size_text(mount['bytes_read'])}; {mount['waited']} had to wait"
    if mount["waited"]:
        median, worst = _seconds(mount["wait_p50"]), _seconds(mount["wait_p99"])
        text += f": p50 {median}, p99 {worst}, longest {_seconds(mount['longest_stall'])}"
    return text + (f"; {mount['waiting']} waiting now" if mount["waiting"] else "")


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _on_terminal(mountpoint: str, *, watch: bool) -> int:
    # Here, because most callers are scripts, and importing it takes longer than all the rest.
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    status = read_status(mountpoint)

    def table() -> Table:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold")
        for label, value in rows(mountpoint, status):
            grid.add_row(label, value)
        return grid

    console = Console(markup=False, highlight=False)
    if not watch:
        console.print(table())
        return 0
    with Live(table(), console=console, auto_refresh=False) as live:
        while not status["memory"]["complete"]:
            time.sleep(INTERVAL)
            status = read_status(mountpoint)
            live.update(table(), refresh=True)
    return 0
