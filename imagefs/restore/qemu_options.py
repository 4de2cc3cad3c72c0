"""The syntax of QEMU's command line: options and their values, without knowing what they mean.

From QEMU 7.2's softmmu/vl.c (lookup_opt), qemu-options.def and util/keyval.c. An option is ``-name`` or ``--name``,
and its value, where it has one, is the next argument, whatever that begins with. An argument that is no option and
no value is a disk image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from imagefs.errors import RestoreError

_WITHOUT_VALUE = """
    S alt-grab async-teardown audio-help ctrl-grab curses daemonize enable-fips enable-kvm enable-sync-profile
    full-screen h help jitdump mem-prealloc no-acpi no-fd-bootchk no-frame no-hpet no-kvm no-kvm-irqchip no-kvm-pit
    no-kvm-pit-reinjection no-quit no-reboot no-shutdown no-user-config nodefaults nographic nouserconfig old-param
    one-insn-per-tb only-migratable perfmap portrait preconfig s sdl semihosting show-cursor singlestep snapshot
    tdf usb version win2k-hack xen-attach xen-create xen-domid-restrict
"""
WITHOUT_VALUE = frozenset(_WITHOUT_VALUE.split())
"""Options of any QEMU from 2.0 to 10.x that take no value; every other one takes one."""

_SIZE = re.compile(r"(0x[0-9a-f]+|\d+(?:\.\d+)?)([bkmgtpe]?)", re.IGNORECASE)
_UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}


class Option(NamedTuple):
    """One option with its value, or (``name`` is None) one argument that is no option."""

    name: str | None
    """Without dashes."""
    value: str | None
    words: tuple[str, ...]
    """As it was given."""


def parse_arguments(arguments: Sequence[str]) -> list[Option]:
    """All arguments after the program's name, in order. RestoreError where the last option lacks its value."""
    options = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            options.append(Option(None, word, (word,)))
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        if name in WITHOUT_VALUE:
            options.append(Option(name, None, (word,)))
            continue
        value = next(words, None)
        if value is None:
            raise RestoreError(f"the QEMU command line ends with {word}, which needs a value")
        options.append(Option(name, value, (word, value)))
    return options


def words_of(options: Iterable[Option]) -> list[str]:
    return [word for option in options for word in option.words]


def split_pieces(value: str) -> list[str]:
    """``a,b=c,,d`` → ``a``, ``b=c,d``: a doubled comma stands for one that belongs to the value."""
    pieces = [""]
    position = 0
    while (comma := value.find(",", position)) >= 0:
        pieces[-1] += value[position:comma]
        if value.startswith(",,", comma):
            pieces[-1] += ","
            position = comma + 2
        else:
            pieces.append("")
            position = comma + 1
    pieces[-1] += value[position:]
    return pieces


def join_pieces(pieces: Iterable[str]) -> str:
    """The inverse of :func:`split_pieces`."""
    return ",".join(piece.replace(",", ",,") for piece in pieces)


def pairs(value: str, implied: str | None = None) -> Iterator[tuple[str, str]]:
    """Keys and values of an option's value. A first piece without ``=`` belongs to the ``implied`` key, later ones are
    switches, ``key`` being ``on`` and ``nokey`` as it stands."""
    for number, piece in enumerate(split_pieces(value)):
        key, equals, rest = piece.partition("=")
        if equals:
            yield key, rest
        elif number == 0 and implied is not None:
            yield implied, piece
        elif piece:
            yield piece, "on"


def object_properties(value: str) -> dict[str, Any]:
    """Properties of an ``-object``, in either of its syntaxes; its type is under ``qom-type``.

    RestoreError where it is JSON that cannot be read.
    """
    if not value.startswith("{"):
        return dict(pairs(value, "qom-type"))
    try:
        properties = json.loads(value)
    except ValueError as error:
        raise RestoreError(f"-object {value}: not understood as JSON ({error})") from error
    return dict(properties)


def parse_size(text: str, unit: str = "b") -> int | None:
    """Bytes of a size as QEMU writes it (``512M``, ``1.5G``, ``0x1000``), in ``unit`` where it names none.

    None where it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found:
        return None
    number, suffix = found[1].lower(), found[2].lower()
    if number.startswith("0x"):
        # In hexadecimal the letters b and e are digits.
        return None if suffix in ("b", "e") else int(number, 16) * _UNITS[suffix or unit]
    scale = _UNITS[suffix or unit]
    whole, _, fraction = number.partition(".")
    return int(whole) * scale + (int(fraction) * scale // 10 ** len(fraction) if fraction else 0)


def size_text(size: int) -> str:
    """Bytes as QEMU takes them, exactly, with the largest unit that allows it: ``512M``."""
    for suffix in "TGMK":
        if size and size % _UNITS[suffix.lower()] == 0:
            return f"{size // _UNITS[suffix.lower()]}{suffix}"
    return f"{size}B"


def merged(options: Iterable[Option], names: Iterable[str], implied: str) -> dict[str, str]:
    """Keys of all options of these names; the last one counts, as QEMU merges them."""
    wanted = set(names)
    result: dict[str, str] = {}
    for option in options:
        if option.name in wanted and option.value is not None:
            result.update(pairs(option.value, implied))
    return result


def as_option(name: str, properties: Mapping[str, str] | str) -> Option:
    """A new option; ``properties`` become ``key=value`` pieces."""
    value = properties if isinstance(properties, str) else join_pieces(f"{k}={v}" for k, v in properties.items())
    return Option(name, value, (f"-{name}", value))
