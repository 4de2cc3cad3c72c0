"""The test guest: Debian's cloud kernel, and an initramfs with busybox and the agent (``guest/agent.c``).

Both are built once into a cache directory ($XDG_CACHE_HOME/imagefs-guest, else ~/.cache/imagefs-guest) and found
there afterwards without a network. The initramfs is deterministic: the same sources give the same bytes, and its
name is made of their digest.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from support import initramfs
from support.commands import run
from support.debian import GuestError, dependencies, unpack
from support.initramfs import Program, build_archive, module_order

Item = TypeVar("Item")

METAPACKAGE = "linux-image-cloud-amd64"
AGENT_SOURCE = Path(__file__).with_name("guest") / "agent.c"
COMPILE = ("gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-s")

CONSOLE_OPTIONS = "console=ttyS0,115200 quiet panic=-1"
"""A panic is shown and ends QEMU (under ``-no-reboot``) instead of hanging."""


@dataclass(frozen=True)
class Guest:
    """A kernel and an initramfs, and what the agent is told on the kernel's command line."""

    kernel: Path
    initramfs: Path
    fill_mib: int = 0
    """MiB of pattern that the agent fills at boot, and can check."""
    kind: str = "random"
    """Of the pattern: ``random`` (incompressible), ``text``, or ``mixed`` (text, random and nearly empty pages)."""
    seed: int = 1
    append: str = ""
    """More of the kernel's command line."""

    @property
    def kernel_options(self) -> str:
        agent = f"imagefs.fill={self.fill_mib} imagefs.kind={self.kind} imagefs.seed={self.seed}"
        return f"{CONSOLE_OPTIONS} {agent} {self.append}".rstrip()


def build_guest(
    *,
    fill_mib: int = 0,
    kind: str = "random",
    seed: int = 1,
    append: str = "",
    modules: Sequence[str] = (),
    cache: Path | None = None,
) -> Guest:
    """The guest out of the cache, built (and its kernel downloaded) if it is not there.

    ``modules`` are kernel modules by name (``virtio_balloon``); they and what they depend on are put into the
    initramfs and loaded in order before the agent starts. Safe to call from several processes at once.
    """
    with locked_cache(cache) as cache:
        tree, kernel = kernel_package(cache)
        return Guest(
            kernel=kernel,
            initramfs=_initramfs(cache, tree, modules),
            fill_mib=fill_mib,
            kind=kind,
            seed=seed,
            append=append,
        )


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "imagefs-guest"


@contextmanager
def locked_cache(cache: Path | None = None) -> Iterator[Path]:
    """The cache directory, made if need be, while nobody else builds there."""
    cache = cache or cache_directory()
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(cache / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield cache


def kernel_package(cache: Path) -> tuple[Path, Path]:
    """The kernel's package, unpacked below ``cache`` (lib/modules is in it), and the kernel in it."""
    ready = sorted(cache.glob("linux-image-*-cloud-amd64"), key=lambda path: path.stat().st_mtime)
    if ready:
        tree = ready[-1]
    else:
        package = _only(dependencies(METAPACKAGE, r"linux-image-\S+-cloud-amd64"), f"kernels of {METAPACKAGE}")
        tree = cache / package
        unpack([package], tree)
    return tree, _only(sorted((tree / "boot").glob("vmlinuz-*")), f"kernels in {tree}, which can be removed")


def cached_initramfs(
    cache: Path, sources: Sequence[Path], names: Sequence[str], build: Callable[[Path], bytes]
) -> Path:
    """The archive that ``build`` makes (in a directory that it may use), kept under a name that is made of ``names``
    and of the digests of ``sources`` and of what goes into every archive.
    """
    key = hashlib.sha256(" ".join(names).encode())
    for source in (*sources, Path(initramfs.__file__), initramfs.BUSYBOX):
        if not source.exists():
            raise GuestError(f"{source} is missing: scripts/setup installs it")
        key.update(hashlib.sha256(source.read_bytes()).digest())
    target = cache / f"initramfs-{key.hexdigest()[:24]}.cpio"
    if not target.exists():
        with tempfile.TemporaryDirectory(prefix="initramfs-", dir=cache) as work:
            built = Path(work) / "initramfs"
            built.write_bytes(build(Path(work)))
            built.rename(target)
    return target


def _initramfs(cache: Path, tree: Path, modules: Sequence[str]) -> Path:
    ordered = module_order(tree, modules)

    def build(work: Path) -> bytes:
        agent = work / "agent"
        run(*COMPILE, "-o", str(agent), str(AGENT_SOURCE))
        return build_archive("exec /agent\n", [Program("/agent", agent.read_bytes())], ordered)

    return cached_initramfs(cache, [AGENT_SOURCE, Path(__file__)], [tree.name, *(path.name for path in ordered)], build)


def _only(found: Sequence[Item], what: str) -> Item:
    if len(found) != 1:
        raise GuestError(f"{what}: {len(found)}, one was expected")
    return found[0]
