"""Samples of kdump-compressed dumps."""

from __future__ import annotations

from imagefs.image.geometry import PAGE_SIZE
from tests.unit.dumps import Page, flatten, kdump, page_of, prstatus_note, qemu_note
from tests.unit.samples import Length, Sample

_DUMP = kdump(
    [Page(0, page_of(0)), Page(1, bytes(PAGE_SIZE)), Page(2, bytes(PAGE_SIZE)), Page(9, page_of(9), flags=0)],
    notes=prstatus_note() + qemu_note(0, cr0=0x11),
    vmcoreinfo=b"PAGESIZE=4096\n",
)

SAMPLES = [
    Sample.of_file(
        "kdump",
        "kdump",
        _DUMP,
        (
            Length("block size", 428, 4, "little", refused=(0, 512, 8192)),
            Length("blocks of sub-header", 432, 4, "little"),
            Length("blocks of bitmaps", 436, 4, "little", refused=(0, 1)),
            Length("size of vmcoreinfo", PAGE_SIZE + 40, 8, "little"),
            Length("size of notes", PAGE_SIZE + 56, 8, "little", refused=(5,)),
            Length("end of frames", PAGE_SIZE + 96, 8, "little", refused=(0,)),
            Length("size of a page", 4 * PAGE_SIZE + 8, 4, "little", refused=(0, 1)),
        ),
    ),
    Sample.of_file("kdump-flattened", "kdump", flatten(_DUMP)),
]
