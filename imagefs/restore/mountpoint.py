"""What a mountpoint says about the guest that can be resumed from it: its ``metadata.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagefs.errors import MountError, RestoreError
from imagefs.restore.other_vmms import how_to_resume

METADATA = "metadata.json"
LARGEST_METADATA = 64 << 20


class MountedImage:
    """A mounted image, of whatever guest. ``mountpoint`` is absolute."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint

    @property
    def memory(self) -> Path:
        return self.mountpoint / "memory"

    @property
    def state(self) -> Path:
        return self.mountpoint / "state"

    def control(self, name: str) -> Path:
        """A control file of the mount."""
        return self.mountpoint / ".imagefs" / name

    def memory_size(self) -> int:
        """Bytes of ``memory``; MountError where it cannot be seen."""
        try:
            return self.memory.stat().st_size
        except OSError as error:
            raise MountError(f"{self.memory}: {error.strerror}") from error


class RestoreImage(MountedImage):
    """A mounted image of a QEMU guest."""

    def __init__(self, mountpoint: Path, machine: str, ram_block: str, ram_bytes: int, cpus: int | None) -> None:
        """``machine`` is the versioned machine type (``pc-i440fx-7.2``); ``ram_block`` the name of the guest's main
        RAM block in the migration stream: ``pc.ram``, or a memory backend's id. ``cpus`` where the stream tells."""
        super().__init__(mountpoint)
        self.machine = machine
        self.ram_block = ram_block
        self.ram_bytes = ram_bytes
        self.cpus = cpus


def read_memory(path: Path) -> MountedImage:
    """For those who need nothing but the memory. MountError where no image is mounted."""
    image = MountedImage(Path(os.path.abspath(path)))
    _restore_part(image.mountpoint, _parse(image.mountpoint / METADATA, read_metadata(image.mountpoint)))
    image.memory_size()
    return image


def read_mountpoint(path: Path) -> RestoreImage:
    """MountError where no image is mounted, RestoreError where the image is none that QEMU can resume."""
    mountpoint = Path(os.path.abspath(path))
    document = _parse(mountpoint / METADATA, read_metadata(mountpoint))
    restore = _restore_part(mountpoint, document)
    if not restore:
        raise RestoreError(
            f"{mountpoint}: this image ({_source(document)}) holds memory only and can be inspected, not resumed"
        )
    if restore.get("vmm") != "qemu":
        raise RestoreError(how_to_resume(restore.get("vmm"), mountpoint))
    blocks = [restore[name] for name in ("ram_blocks", "plugged_blocks") if isinstance(restore.get(name), dict)]
    if blocks:
        names = ", ".join(str(name) for group in blocks for name in group)
        raise RestoreError(
            f"{mountpoint}: the guest's memory is in several backends ({names}), which no door takes yet; whoever saved"
            f" it can load it whole from {mountpoint / 'native'}"
        )
    cpus = restore.get("cpus")
    image = RestoreImage(
        mountpoint=mountpoint,
        machine=str(_field(mountpoint, restore, "machine", str)),
        ram_block=str(_field(mountpoint, restore, "ram_block", str)),
        ram_bytes=int(_field(mountpoint, restore, "ram_bytes", int)),
        cpus=cpus if isinstance(cpus, int) and cpus > 0 else None,
    )
    _check_files(image)
    return image


def read_metadata(mountpoint: Path) -> bytes:
    """The text of ``metadata.json``; MountError where no image is mounted."""
    path = mountpoint / METADATA
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST_METADATA)
    except (FileNotFoundError, NotADirectoryError):
        if not mountpoint.is_dir():
            raise MountError(f"{mountpoint}: no such directory") from None
        raise MountError(
            f"{mountpoint}: no imagefs is mounted there (no {METADATA}); mount the image first: "
            f"mount.imagefs STORE/NAME {mountpoint}"
        ) from None
    except OSError as error:
        raise MountError(f"{path}: {error.strerror}") from error


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise MountError(f"{path}: not what an imagefs mount shows (no JSON object)")
    return document


def _restore_part(mountpoint: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    restore = document.get("restore")
    if not isinstance(restore, dict):
        raise MountError(f"{mountpoint / METADATA}: not what an imagefs mount shows (no 'restore')")
    return restore


def _source(document: Mapping[str, Any]) -> str:
    source = document.get("source")
    name = source.get("format") if isinstance(source, dict) else None
    return f"from the format {name}" if name else "of an unknown format"


def _field(mountpoint: Path, restore: Mapping[str, Any], name: str, kind: type) -> Any:
    value = restore.get(name)
    if not isinstance(value, kind) or not value:
        raise MountError(f"{mountpoint / METADATA}: not what an imagefs mount shows (restore.{name} is {value!r})")
    return value


def _check_files(image: RestoreImage) -> None:
    for path in (image.memory, image.state):
        try:
            size = path.stat().st_size
        except OSError as error:
            raise MountError(f"{path}: {error.strerror}") from error
        if path == image.memory and size != image.ram_bytes:
            raise MountError(f"{path} has {size:,} bytes, the guest's RAM {image.ram_bytes:,}")
