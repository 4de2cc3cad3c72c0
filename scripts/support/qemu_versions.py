"""The QEMUs that tests run: the installed one, and a newer one from Debian's backports.

The newer one is not installed: apt downloads it, with whatever it needs beyond this machine's packages, through an
apt configuration of its own (this machine's sources and state stay as they are); the packages are unpacked into a
cache, and scripts start its programs with their own libraries and firmware.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("qemu-system-x86", "qemu-utils")
PROGRAMS = ("qemu-system-x86_64", "qemu-img", "qemu-io", "qemu-nbd")
INSTALLED = "qemu-system-x86_64"

_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_START = """\
#!/bin/sh
export LD_LIBRARY_PATH={tree}/{libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}
export QEMU_MODULE_DIR={tree}/{libraries}/qemu
exec {tree}/usr/bin/{program} {firmware}"$@"
"""
_FIRMWARE = "-L {tree}/usr/share/qemu -L {tree}/usr/share/seabios -L /usr/share/qemu -L /usr/share/seabios "


class QemuError(Exception):
    """The newer QEMU cannot be had here; says why."""


def backports_qemu(program: str = INSTALLED) -> Path:
    """A program of the newer QEMU (10.0 or later), downloaded the first time. Safe to call from several processes."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(base) / "imagefs-qemu"
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        tree = cache / "backports"
        if not tree.exists():
            with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as work:
                unpacked = _unpack(_download(Path(work)), Path(work) / "tree", tree)
                unpacked.rename(tree)
        return tree / "imagefs" / program


def _unpack(packages: list[Path], into: Path, final: Path) -> Path:
    for package in packages:
        _run("dpkg", "-x", str(package), str(into))
    scripts = into / "imagefs"
    scripts.mkdir()
    for program in PROGRAMS:
        firmware = _FIRMWARE.format(tree=final) if program == INSTALLED else ""
        script = scripts / program
        script.write_text(_START.format(tree=final, libraries=_LIBRARIES, program=program, firmware=firmware))
        script.chmod(0o755)
    return into


def _download(work: Path) -> list[Path]:
    """The packages that a machine like this one lacks for the newer QEMU."""
    archive, suite, key = _archive()
    sources = work / "sources.list"
    option = f"[signed-by={key}] " if key else ""
    sources.write_text("".join(f"deb {option}{archive} {name} main\n" for name in (suite, f"{suite}-backports")))
    for name in ("lists/partial", "archives/partial"):
        (work / name).mkdir(parents=True)
    places = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": work / "lists",
        "Dir::Cache": work,
        "Dir::Cache::Archives": work / "archives",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",  # nothing of the machine's is changed, and its apt may be at work
    }
    apt = ["apt-get", "-q", "-y", *(word for key, value in places.items() for word in ("-o", f"{key}={value}"))]
    _run(*apt, "update")
    _run(*apt, "-d", "--no-install-recommends", "-t", f"{suite}-backports", "install", *PACKAGES)
    packages = sorted((work / "archives").glob("*.deb"))
    if not any(package.name.startswith(f"{PACKAGES[0]}_") for package in packages):
        raise QemuError(f"{suite}-backports has no newer {PACKAGES[0]} than the installed one")
    return packages


def _archive() -> tuple[str, str, str]:
    """Debian's archive as this machine's apt knows it: its address, the release's name, the keyring (or nothing)."""
    release = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    if release is None:
        raise QemuError("/etc/os-release names no Debian release")
    line = "$(CODENAME) $(REPO_URI) $(SIGNED_BY)"
    for _ in range(2):
        known = _run("apt-get", "indextargets", "--format", line, "Created-By: Packages")
        for codename, uri, *key in map(str.split, known.splitlines()):
            if codename == release[1]:
                keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
                named = key[0] if key and key[0].startswith("/") else ""
                return uri, release[1], named or (str(keyring) if keyring.exists() else "")
        _run("apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", "update")
    raise QemuError(f"apt has no source for {release[1]}: the newer QEMU comes from its backports")


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise QemuError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise QemuError(f"{' '.join(command)} failed with status {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def qemu_programs() -> dict[str, str]:
    """``installed`` and ``backports``: what to start for each."""
    if shutil.which(INSTALLED) is None:
        raise QemuError(f"{INSTALLED} is not installed")
    return {"installed": INSTALLED, "backports": str(backports_qemu())}
