"""The ``imagefs`` command: one module a subcommand, imported only when it is the one that runs.

A subcommand's module has ``SUMMARY``, ``configure(parser)`` and ``run(args) -> exit status``. Exit statuses: 0 done,
1 it failed (one line on stderr says what, where and what to do), 2 the command line makes no sense, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from imagefs.cli.signals import EndedBySignal
from imagefs.cli.version import ShowVersion
from imagefs.errors import ImagefsError, UsageError

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

COMMANDS = {
    "split": "split a saved VM into an image in a store",
    "suspend": "suspend a running QEMU into an image in a store",
    "info": "show what is known about an image",
    "ls": "list an image's files or pages",
    "verify": "read a whole image and name what is damaged",
    "serve": "serve a store over HTTP, for trying things",
    "restore": "resume a guest from a mounted image",
    "translate": "find where in a mounted guest's memory a virtual address is",
    "hexdump": "show memory of a mounted guest, by guest-physical or virtual address",
    "trace": "publish, show or remove the working set of an image",
    "status": "show what a mount has fetched and is fetching",
}

DESCRIPTION = """\
Start a virtual machine before its memory has arrived.

    imagefs split vm.save store/vm1              a saved VM becomes an image in a store
    imagefs suspend --qmp SOCKET store/vm1       so does a running QEMU
    imagefs serve store                          any static web server will do, too
    mount.imagefs http://HOST:8080/vm1 /mnt/vm1  on another host: mounted at once
    imagefs restore /mnt/vm1 -- qemu-system-x86_64 -m 512M ...
    umount /mnt/vm1
"""

INTERNAL_ERROR = 70
"""EX_SOFTWARE of sysexits.h: none of the user's doing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``imagefs``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded("imagefs", lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    args = _parse(arguments)
    logging.basicConfig(
        level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)],
        format="imagefs: %(message)s" if args.verbose < 2 else "%(asctime)s %(name)s: %(message)s",
    )
    return guarded(f"imagefs {args.command}", lambda: int(args.run(args)), debug=args.verbose > 1)


def guarded(program: str, run: Callable[[], int], *, debug: bool = False) -> int:
    """Run a command so that its user sees one line for an error, never a traceback."""
    try:
        status = run()
        # Here and not at the interpreter's exit, where errors get no message of ours.
        _flush()
        return status
    except EndedBySignal as ending:
        return _complain(program, f"ended by {ending.name}", ending.status, debug=False)
    except SystemExit:
        # argparse has printed what there is to say.
        if _flush_or_discard():
            return 128 + signal.SIGPIPE
        raise
    except UsageError as error:
        return _complain(program, error, 2, debug)
    except ImagefsError as error:
        return _complain(program, error, 1, debug)
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        _flush_or_discard()
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(program, f"{where}{(error.strerror or str(error)).lower()}", 1, debug)
    except KeyboardInterrupt:
        return _complain(program, "interrupted", 128 + signal.SIGINT, debug=False)
    except Exception as error:
        if debug:
            raise
        what = f"internal error, please report it with the output of -vv: {type(error).__name__}: {error}"
        return _complain(program, what, INTERNAL_ERROR, debug)


def _complain(program: str, error: object, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    with suppress(OSError):
        print(f"{program}: {error}", file=sys.stderr)
    _flush_or_discard()
    return status


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _flush_or_discard() -> bool:
    """If what is still in stdout's buffer cannot be written, keep the interpreter from trying at its exit; whether
    that is because nobody reads it."""
    try:
        _flush()
    except OSError as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return isinstance(error, BrokenPipeError)
    return False


class _Parser(argparse.ArgumentParser):
    """Complains in one line, and alike in all versions of Python: some hide that an output is closed, some stumble."""

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        file = file or sys.stderr
        if message and file is not None:
            file.write(message)

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        self.exit(2, f"{self.prog}: {message} ({usage}; see {self.prog} --help)\n")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="imagefs", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action=ShowVersion)
    _add_verbose(parser, 0)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        _add_verbose(command, argparse.SUPPRESS)
        if name == wanted:
            module = import_module(f"imagefs.cli.{name}")
            module.configure(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(arguments)


def _add_verbose(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument(
        "-v", "--verbose", action="count", default=default, help="say more; twice: everything, tracebacks included"
    )
