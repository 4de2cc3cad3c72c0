"""Machine types: which one a QEMU has for a name, and whether an image's guest can run on it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from typing import NamedTuple

from imagefs.errors import RestoreError

HELP_SECONDS = 60.0

_LINE = re.compile(r"^(\S+)\s+(.*)$")
_ALIAS = re.compile(r"\(alias of (\S+)\)")
_VERSION = re.compile(r"-\d+(\.\d+)+$")
_ALIASES = {"pc": "pc-i440fx", "q35": "pc-q35"}
"""What every QEMU of x86-64 means by them, in its own newest version."""


class Machines(NamedTuple):
    """What one QEMU program offers."""

    program: str
    types: frozenset[str]
    aliases: Mapping[str, str]
    """``pc`` → ``pc-i440fx-7.2``."""


def parse_machine_help(program: str, text: str) -> Machines:
    """From the output of ``-machine help``: a headline, then a line a machine, its name first."""
    types, aliases = set(), {}
    for line in text.splitlines()[1:]:
        if found := _LINE.match(line):
            if alias := _ALIAS.search(found[2]):
                aliases[found[1]] = alias[1]
            else:
                types.add(found[1])
    return Machines(program, frozenset(types), aliases)


def list_machines(program: str) -> Machines:
    """Asks the program itself; RestoreError where it does not answer as QEMU does."""
    try:
        done = subprocess.run(
            [program, "-machine", "help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=HELP_SECONDS,
            check=False,
        )
    except OSError as error:
        raise RestoreError(f"{program}: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise RestoreError(f"{program} -machine help: no answer within {HELP_SECONDS:g} seconds") from None
    machines = parse_machine_help(program, done.stdout)
    if done.returncode or not machines.types:
        reason = (done.stderr.strip().splitlines() or ["it lists no machines"])[0]
        raise RestoreError(f"{program} -machine help failed, is it a QEMU? {reason}")
    return machines


def choose_machine(given: str | None, wanted: str, machines: Callable[[], Machines]) -> str:
    """The machine type to start QEMU with, for a user who gave ``given`` (or none) and an image saved on ``wanted``.

    A guest can run only on the very machine type that it was saved on. Who names none, or only the alias of a
    family, gets that one: ``pc`` of QEMU 10 means pc-i440fx-10.0, and QEMU 10 has pc-i440fx-7.2 as well. Who names
    another type on purpose is told. ``machines`` is asked only then: that starts a QEMU, and the guest waits. So it is
    QEMU itself that complains of a machine that it is too old for.

    Raises RestoreError, naming both types.
    """
    if given in (None, wanted) or _ALIASES.get(given) == _family(wanted):
        return wanted
    known = machines()
    if wanted not in known.types:
        raise RestoreError(
            f"the image was saved on machine {wanted}, which {known.program} does not have: "
            "use the QEMU version that saved it, or a newer one"
        )
    meant = known.aliases.get(given, given)
    if meant == wanted or (given in known.aliases and _family(meant) == _family(wanted)):
        return wanted
    which = f"{given} ({meant})" if meant != given else given
    raise RestoreError(
        f"the image was saved on machine {wanted}, the command line says {which}: give -machine {wanted}"
    )


def _family(machine: str) -> str:
    """``pc-q35-7.2`` → ``pc-q35``."""
    return _VERSION.sub("", machine)
