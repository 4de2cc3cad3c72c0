"""What a user can choose with ``-o``, parsed; pure."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from imagefs.errors import UsageError

DEFAULT_TIMEO = 60.0
"""Seconds, as for NFS."""
MAX_READAHEAD = 16384
MAX_CONNECTIONS = 64

# mount(8)'s file-system independent options that mean nothing here, or that are always so: nothing can be written, and
# device files, set-user-id files or programs do not occur.
_INDEPENDENT = """
async atime auto defaults dev diratime dirsync exec group iversion lazytime loud mand noatime noauto nodev nodiratime
nofail noiversion nolazytime nomand norelatime nostrictatime nosuid nouser owner relatime ro rw silent strictatime suid
sync user users _netdev
"""
IGNORED = frozenset(_INDEPENDENT.split())
IGNORED_PREFIXES = ("x-", "X-", "comment=", "user=", "helper=", "uhelper=")


@dataclass(frozen=True, slots=True)
class MountOptions:
    """Defaults are those of ``mount.imagefs`` without ``-o``.

    ``ro`` is taken for granted and therefore ignored, like ``rw``, which mount(8) passes when nothing else is said:
    a VMM must be able to open ``memory`` O_RDWR, so the kernel is told ``rw`` and the daemon refuses every write.
    """

    allow_other: bool = False
    uid: int | None = None
    gid: int | None = None
    cache: Path | None = None
    """Directory of the cache; None is :func:`default_cache`."""
    use_cache: bool = True
    soft: bool = False
    timeo: float = DEFAULT_TIMEO
    """Seconds until a read on a soft mount fails."""
    prefetch: Literal["none", "ws", "all"] = "all"
    connections: int = 16
    readahead: int | None = None
    """KiB that the kernel reads ahead; None leaves its default of 128. See docs/mounting.md for what was measured."""
    log: Path | None = None
    noexec: bool = False

    @property
    def timeout(self) -> float | None:
        """Seconds that a read waits; None is as long as it takes."""
        return self.timeo if self.soft else None

    @property
    def others_may_enter(self) -> bool:
        """Whether the kernel lets anyone but the mounting user in. Modes still keep out all but the owner.

        ``uid=`` implies it: files that their owner cannot reach would be of no use.
        """
        return self.allow_other or self.uid is not None

    def as_json(self) -> dict[str, Any]:
        """For status.json."""
        return {
            "hard": not self.soft,
            "timeo": self.timeo if self.soft else None,
            "prefetch": self.prefetch,
            "connections": self.connections,
            "cache": str(self.cache) if self.use_cache and self.cache else None,
            "readahead": self.readahead,
            "allow_other": self.others_may_enter,
        }


def parse_options(text: str, base: MountOptions | None = None) -> MountOptions:
    """A comma-separated list as mount(8) passes it. Later options win. UsageError names the one that is wrong."""
    options = base or MountOptions()
    for word in text.split(","):
        if not word or word in IGNORED or word.startswith(IGNORED_PREFIXES):
            continue
        name, given, value = word.partition("=")
        if given and not value:
            raise UsageError(f"option {name}= needs a value")
        options = replace(options, **(_valued(name, value) if given else _flag(name)))
    return options


def default_cache(euid: int, environ: Mapping[str, str]) -> Path:
    """Where pages are kept unless ``cache=`` says otherwise."""
    if euid == 0:
        return Path("/var/cache/imagefs")
    # The specification says that a relative path in XDG_CACHE_HOME is to be ignored.
    given = environ.get("XDG_CACHE_HOME", "")
    return Path(given if given.startswith("/") else Path(environ.get("HOME", "/")) / ".cache") / "imagefs"


def _flag(name: str) -> dict[str, Any]:
    match name:
        case "allow_other" | "noexec":
            return {name: True}
        case "nocache":
            return {"use_cache": False, "cache": None}
        case "hard" | "soft":
            return {"soft": name == "soft"}
        case "remount":
            raise UsageError("remount: options cannot be changed while mounted; unmount, then mount again")
        case "cache" | "gid" | "log" | "prefetch" | "readahead" | "connections" | "timeo" | "uid":
            raise UsageError(f"option {name} needs a value: {name}=…")
        case _:
            raise UsageError(f"unknown option: {name}")


def _valued(name: str, value: str) -> dict[str, Any]:
    match name:
        case "uid":
            return {"uid": _account(name, value)}
        case "gid":
            return {"gid": _account(name, value)}
        case "cache":
            return {"cache": Path(value), "use_cache": True}
        case "log":
            return {"log": Path(value)}
        case "timeo":
            return {"timeo": _seconds(name, value)}
        case "prefetch":
            if value not in ("none", "ws", "all"):
                raise UsageError(f"prefetch={value}: none, ws or all")
            return {"prefetch": value}
        case "readahead":
            return {"readahead": _number(name, value, 0, MAX_READAHEAD)}
        case "connections":
            return {"connections": _number(name, value, 1, MAX_CONNECTIONS)}
        case _:
            raise UsageError(f"unknown option: {name}={value}")


def _number(name: str, value: str, low: int, high: int) -> int:
    if not value.isascii() or not value.isdigit() or not low <= int(value) <= high:
        raise UsageError(f"{name}={value}: a number from {low} to {high}")
    return int(value)


def _seconds(name: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e6:
        raise UsageError(f"{name}={value}: a number of seconds above zero")
    return seconds


def _account(name: str, value: str) -> int:
    """A number, or the name of a user or group of this host."""
    if value.isascii() and value.isdigit() and int(value) < 2**32 - 1:
        return int(value)
    try:
        return pwd.getpwnam(value).pw_uid if name == "uid" else grp.getgrnam(value).gr_gid
    except KeyError:
        raise UsageError(f"{name}={value}: there is no such {'user' if name == 'uid' else 'group'}") from None
