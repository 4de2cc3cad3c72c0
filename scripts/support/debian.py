"""Debian packages as directories: downloaded by apt and unpacked, never installed."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from support.commands import run

_RELATIONS = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")


class GuestError(Exception):
    """The guest cannot be built here; says what is missing."""


def dependencies(package: str, pattern: str) -> list[str]:
    """Packages that ``package`` depends on, directly or not, as far as the names match ``pattern``
    (``re.fullmatch``).

    Fetches apt's lists where there are none; GuestError where apt does not know the package even then.
    """
    if not _is_known(package):
        run("apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", "update")
    if not _is_known(package):
        raise GuestError(f"apt knows no package {package}: the test guest needs Debian's package sources")
    listed = run("apt-cache", "depends", "--recurse", *(f"--no-{relation}" for relation in _RELATIONS), package)
    needs: dict[str, list[str]] = {}
    for line in listed.splitlines():
        if not line.startswith(" "):
            needed = needs.setdefault(line, [])
        elif found := re.search(r"Depends: (\S+)$", line):
            needed.append(found[1])
    reached = [package]
    for name in reached:
        reached += [
            new for new in dict.fromkeys(needs.get(name, [])) if new not in reached and re.fullmatch(pattern, new)
        ]
    return reached[1:]


def unpack(packages: Sequence[str], target: Path) -> None:
    """The files of all ``packages`` below the new directory ``target``, which is there whole or not at all."""
    work = Path(tempfile.mkdtemp(prefix="packages-", dir=target.parent))
    try:
        # apt-get drops to the user _apt where it may write as that; this directory it may not, and says so.
        run("apt-get", "-q", "download", *packages, cwd=work)
        for archive in sorted(work.glob("*.deb")):
            run("dpkg", "-x", str(archive), str(work / "tree"))
        (work / "tree").rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_known(package: str) -> bool:
    return bool(run("apt-cache", "search", "--names-only", f"^{re.escape(package)}$"))
