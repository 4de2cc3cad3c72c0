"""A sample of a qcow2 image with a VM's state, and how such images are made: by qemu-img and qemu-io."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.unit.samples import Length, Sample
from tests.unit.streams import Record, build, page_of

STREAM = build(
    [
        [Record("page", "pc.ram", page, page_of(page)) for page in range(6)],
        [
            Record("fill", "pc.ram", 6, b"\0"),
            Record("fill", "pc.ram", 7, b"\0"),
            Record("zlib", "vga.vram", 0, page_of(9)),
        ],
    ]
)
CLUSTER = 512
DISK = 100 * CLUSTER


def tool(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@dataclass
class Image:
    """A qcow2 image whose snapshots are made as ``savevm`` makes them."""

    path: Path

    def create(self, options: str = f"cluster_size={CLUSTER}") -> None:
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(self.path), str(DISK))
        tool("qemu-io", "-c", f"write -P 7 0 {10 * CLUSTER}", str(self.path))

    def save(self, name: str, state: bytes, before: str = "write -P 8 1k 2k") -> None:
        """In two halves, with something between them, so that the clusters are not in one piece."""
        source = self.path.parent / "state"
        half = len(state) // 2 // CLUSTER * CLUSTER
        for number, (at, part) in enumerate(((half, state[half:]), (0, state[:half]))):
            part += bytes(-len(part) % 512)
            source.write_bytes(part)
            tool("qemu-io", "-c", f"write -b -s {source} {at} {len(part)}", str(self.path))
            if not number:
                tool("qemu-io", "-c", before, "-c", "write -P 9 40k 600", str(self.path))
        tool("qemu-img", "snapshot", "-c", name, str(self.path))
        self._say_size(name, len(state))

    def _say_size(self, name: str, size: int) -> None:
        """``qemu-img`` makes a snapshot of the disk; ``savevm`` would have said how large the state is."""
        data = bytearray(self.path.read_bytes())
        number = b"1" if name == "one" else b"2"
        at = data.rindex(number + name.encode())
        # Before id and name: a header of 40 bytes, and 16 (24 since QEMU 7) of extra data, whose size is at its end.
        for extra in (16, 24):
            start = at - 40 - extra
            if int.from_bytes(data[start + 36 : start + 40], "big") == extra:
                data[start + 32 : start + 36] = size.to_bytes(4, "big")
                data[start + 40 : start + 48] = size.to_bytes(8, "big")
                self.path.write_bytes(data)
                return
        raise AssertionError("no snapshot's entry there")


def _made() -> bytes:
    with TemporaryDirectory(prefix="imagefs-test-") as directory:
        image = Image(Path(directory) / "disk.qcow2")
        image.create()
        image.save("one", STREAM.data)
        return image.path.read_bytes()


_MADE = _made()
_TABLE_END = _MADE.rindex(b"1one") + len(b"1one")
"""The table of snapshots is what was written last, so there is nothing behind it that could be missing."""

SAMPLES = [
    Sample.of_file(
        "qcow2",
        "qcow2",
        _MADE,
        (
            Length("cluster bits", 20, 4, refused=(0, 8, 22)),
            Length("size of the L1 table", 36, 4, refused=(0,)),
            Length("number of snapshots", 60, 4, refused=(0,)),
            Length("offset of snapshots", 64, 8, refused=(1,)),
        ),
        lambda _, length: length >= _TABLE_END,
        tries=25,
    )
]
