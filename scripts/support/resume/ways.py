"""Ways to resume a guest whose memory is elsewhere: ours, and the plain one. Other programs': :mod:`.peers`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from support.mounts import mounted
from support.resume.site import IMAGE, Site


@dataclass(frozen=True)
class Place:
    """Where a resume takes place."""

    site: Site
    url: str | None
    """The site's root over the link; None where it is on this host's disk."""
    work: Path
    """An empty directory of this resume's own."""
    full_cache: Path
    """A cache directory in which the whole image is, made by :func:`fill_cache`."""
    deadline: float
    """Of ``time.monotonic()``: nothing that begins is waited for longer."""

    def at(self, name: str) -> str:
        """A file of the site, as this host can have it."""
        return f"{self.url or self.site.root}/{name}"


@dataclass(frozen=True)
class Start:
    """What makes QEMU's command line resume: before it, at its end, and in its environment."""

    prefix: Sequence[str] = ()
    extra: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Way(Protocol):
    """One way to resume."""

    @property
    def name(self) -> str:
        """As ``--ways`` takes it."""

    @property
    def label(self) -> str:
        """As people read it."""

    @property
    def forms(self) -> tuple[str, ...]:
        """Of the site's forms those that it needs: save, flat, casync, recorded, cache."""

    def suits(self, remote: bool) -> bool:
        """Whether it can be used over a link, or from a local disk."""

    def open(self, place: Place) -> AbstractContextManager[Start]:
        """Everything before QEMU, until it can be started; undone afterwards. Raises TimeoutError at the deadline."""


@dataclass(frozen=True)
class Imagefs:
    """A mount, and ``imagefs restore``."""

    name: str
    label: str
    door: str = "auto"
    options: str = ""
    """More of ``mount.imagefs -o``."""
    store: str = "store"
    warm: bool = False
    """With a cache in which all is; otherwise with an empty one."""

    @property
    def forms(self) -> tuple[str, ...]:
        return tuple(form for form, wanted in (("recorded", self.store == "recorded"), ("cache", self.warm)) if wanted)

    def suits(self, remote: bool) -> bool:
        return True

    @contextmanager
    def open(self, place: Place) -> Iterator[Start]:
        cache = place.full_cache if self.warm else place.work / "cache"
        options = ",".join(filter(None, [f"cache={cache}", self.options]))
        with mounted(place.at(f"{self.store}/{IMAGE}"), place.work / "mnt", options) as mountpoint:
            yield Start(prefix=["imagefs", "restore", "--door", self.door, str(mountpoint), "--"])


@dataclass(frozen=True)
class Download:
    """The whole compressed save, restored as it comes: no time is lost between the two."""

    name: str = "download"
    label: str = "curl | zstd -d, then restore"
    forms: tuple[str, ...] = ("save",)

    def suits(self, remote: bool) -> bool:
        return True

    @contextmanager
    def open(self, place: Place) -> Iterator[Start]:
        save = shlex.quote(place.at("vm1.save.zst"))
        yield Start(extra=["-incoming", f"exec:{f'curl -sSf {save} | zstd -dc' if place.url else f'zstd -dc {save}'}"])
