"""Internal snapshots of qcow2 images, with the state of the VM: what QEMU's ``savevm`` writes.

The state is a QEMU migration stream (qemu_sections.py) in clusters of the image. docs/interop/qcow2.txt of QEMU:

| bytes | field | meaning                                                                                            |
|------:|-------|----------------------------------------------------------------------------------------------------|
|     4 | magic | ``QFI`` 0xfb                                                                                       |
|     … |       | the rest is left to ``qemu-img``                                                                   |

The state of a snapshot lies in the address space of its disk, behind the disk's end, at the next multiple of what one
L2 table maps: cluster size squared, divided by 8 (by 16 with extended L2 entries). ``qemu-img`` has no command for it,
but puts it within reach: in a scratch image over this one (which is only read), the snapshot is applied and the disk
enlarged over the state, and ``qemu-img map`` says where each piece of it is in this file.

The native file is the whole image, its disk too: most of it is literals then.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Input, NativeRecorder, Workspace
from imagefs.formats.embedded import EmbeddedStream, lay_over
from imagefs.formats.qemu_sections import StreamReader
from imagefs.formats.stream_cursor import StreamCursor
from imagefs.formats.stream_pages import PagesInPlace
from imagefs.image.capture import BytesSource, Capture

MAGIC = b"QFI\xfb"

_SECONDS = 600
_LARGEST_CLUSTER = 2 << 20
_LARGEST_STATE = 1 << 46
_SCRATCH_MORE = 1 << 30
"""Bytes behind the image that ``qemu-img`` may write tables to."""


class Qcow2:
    """The format ``qcow2``."""

    name = "qcow2"

    def matches(self, source: Input) -> bool:
        return source.head.startswith(MAGIC)

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        if memory_files:
            raise UsageError(f"--memory {memory_files[0]}: a snapshot has its memory itself")
        if not source.head.startswith(MAGIC):
            raise UnsupportedInputError(f"{source.head[:4].hex()} is not {MAGIC.hex()}", field="magic", offset=0)
        file = source.whole(workspace)
        image = _Image(file.path)
        snapshot = image.choose(source.snapshot)
        stream = EmbeddedStream(file)
        for place, length in image.state_pieces(snapshot):
            if place + length > file.size:
                raise UnsupportedInputError(
                    f"the file ends before byte {place + length:#x}, where the state of a snapshot is",
                    field="clusters of the state",
                    offset=file.size,
                )
            stream.add(place, length)
        inner = NativeRecorder(workspace)
        cursor = StreamCursor(stream.read_into, inner.builder.literal)
        try:
            guest = StreamReader(
                cursor, inner.builder, workspace, lambda pages: PagesInPlace(workspace, pages, stream)
            ).read()
        except UnsupportedInputError as error:
            raise UnsupportedInputError(
                f"{error.reason} (in the state of snapshot {snapshot['name']!r})",
                field=error.field,
                offset=error.offset,
            ) from error
        native = NativeRecorder(workspace)
        try:
            lay_over(native.builder, stream, inner.finish(guest.exceptions, guest.superseded))
        except ValueError as error:
            raise UnsupportedInputError(str(error), field="clusters of the state", offset=0) from error
        about = json.dumps(snapshot, indent=1, sort_keys=True).encode()
        nothing = BytesSource(b"")
        return guest.capture(self.name, image.version, native.finish(nothing, nothing), {"snapshot.json": about})


FORMAT = Qcow2()


class _Image:
    """The image at ``path``, through ``qemu-img``."""

    def __init__(self, path: str) -> None:
        self._path = path
        about = json.loads(_qemu_img("info", "--output=json", "-f", "qcow2", path))
        special = about.get("format-specific", {}).get("data", {})
        if "data-file" in special:
            raise _refused("its clusters are in another file (data_file), which is not supported")
        self.version = str(special.get("compat", ""))
        self._snapshots: list[dict[str, Any]] = [each for each in about.get("snapshots", ()) if each["vm-state-size"]]
        cluster = int(about["cluster-size"])
        if not 0 < cluster <= _LARGEST_CLUSTER:
            raise _refused(f"clusters of {cluster} bytes")
        self._cluster = cluster
        self._mapped_by_l2 = cluster * cluster // (16 if special.get("extended-l2") else 8)

    def choose(self, wanted: str | None) -> dict[str, Any]:
        """The snapshot of that name or id, or the only one that has a VM's state."""
        names = ", ".join(ascii(each["name"]) for each in self._snapshots)
        if not self._snapshots:
            raise _refused("it has no snapshot with the state of a VM")
        if wanted is None:
            if len(self._snapshots) > 1:
                raise UsageError(f"several snapshots have the state of a VM: say which with --snapshot ({names})")
            return self._snapshots[0]
        for key in ("name", "id"):
            for each in self._snapshots:
                if each[key] == wanted:
                    return each
        raise UsageError(f"--snapshot {wanted}: no such snapshot with the state of a VM; there are {names}")

    def state_pieces(self, snapshot: dict[str, Any]) -> Iterator[tuple[int, int]]:
        """Place in the file and length of the state's pieces, in order."""
        size = int(snapshot["vm-state-size"])
        if size > _LARGEST_STATE:
            raise _refused(f"a state of {size:,} bytes")
        with tempfile.TemporaryDirectory(prefix="imagefs-qcow2-") as directory:
            scratch = f"{directory}/scratch"
            room = os.stat(self._path).st_size + _SCRATCH_MORE
            _qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", self._path, scratch, str(room))
            inner = {"driver": "qcow2", "file": {"driver": "file", "filename": scratch}}
            nested = "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": inner})
            if self.version == "0.10":  # of which qemu-img resizes none that has snapshots
                _qemu_img("amend", "-q", "-o", "compat=1.1", nested)
            _qemu_img("snapshot", "-q", "-a", str(snapshot["id"]), nested)
            disk = int(json.loads(_qemu_img("info", "--output=json", nested))["virtual-size"])
            start = -(-disk // self._mapped_by_l2) * self._mapped_by_l2
            _qemu_img("resize", "-q", nested, str(start + -(-size // self._cluster) * self._cluster))
            at, end = start, start + size
            lines = _qemu_img("map", "--output=json", f"--start-offset={start}", nested)
            for extent in map(_extent, lines.splitlines()):
                if at >= end:
                    break
                if extent["start"] != at or "offset" not in extent or not extent["data"]:
                    raise _no_cluster(at - start)
                yield extent["offset"], min(extent["length"], end - at)
                at += extent["length"]
            if at < end:
                raise _no_cluster(at - start)


def _extent(line: str) -> dict[str, Any]:
    """One of the list that ``qemu-img map`` prints, each on a line of its own."""
    extent: dict[str, Any] = json.loads(line.strip("[], \n"))
    return extent


def _no_cluster(at: int) -> UnsupportedInputError:
    return UnsupportedInputError(
        f"no plain cluster has byte {at:#x} of the snapshot's state", field="clusters of the state", offset=0
    )


def _qemu_img(command: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["qemu-img", command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise UsageError("qemu-img is not installed: qcow2 images are read with it") from None
    except subprocess.TimeoutExpired:
        raise _refused(f"qemu-img {command} took longer than {_SECONDS} s") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[0]
        raise _refused(said.removeprefix("qemu-img: "))
    return done.stdout


def _refused(reason: str) -> UnsupportedInputError:
    return UnsupportedInputError(reason, field="qcow2 image", offset=0)
