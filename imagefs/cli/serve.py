"""``imagefs serve STORE``: a store over HTTP, for trying things."""

from __future__ import annotations

import argparse
import ipaddress
import signal
import sys
from pathlib import Path

from imagefs.store.serve import StoreServer, format_address, parse_address

SUMMARY = "serve a store over HTTP, for trying things"

DESCRIPTION = """\
Serve the directory STORE over HTTP, so that an image can be mounted from another host:

    imagefs serve store --bind 127.0.0.1:8080
    mount.imagefs http://127.0.0.1:8080/vm1 /mnt/vm1

This is for trying things. In production, let any static web server serve the
directory; imagefs needs nothing but GET with Range.

There is no access control and no encryption, and a memory image holds whatever
the guest had in memory: passwords, keys, mail. Bind to an address that others
can reach only in a network that you trust.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.add_argument("store", metavar="STORE", type=Path, help="the directory that holds the images")
    parser.add_argument(
        "--bind",
        metavar="ADDR:PORT",
        default="127.0.0.1:8080",
        help="where to listen; [ADDR]:PORT for IPv6, port 0 for any that is free (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM, both an ordinary end."""
    host, port = parse_address(args.bind)
    try:
        server = StoreServer(args.store, (host, port))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        print(f"imagefs serve: {format_address(host, port)}: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _interrupt)
    with server:
        try:
            bound = str(server.server_address[0])
            if not ipaddress.ip_address(bound.partition("%")[0]).is_loopback:
                print(
                    f"imagefs serve: warning: {bound} can be reached by others, and memory images hold secrets",
                    file=sys.stderr,
                )
            print(f"serving {args.store} at {server.url}/ (Ctrl-C ends it)", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            pass
    return 0


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
