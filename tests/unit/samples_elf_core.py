"""Samples of ELF cores."""

from __future__ import annotations

from tests.unit.dumps import EM_386, Load, elf_core, note, page_of, pages_of, prstatus_note, qemu_note
from tests.unit.samples import Length, Sample

_NOTES = prstatus_note() + qemu_note(0x1000) + note(b"VMCOREINFO", 0, b"OSRELEASE=6.1\n")
_CORE = elf_core([Load(0, pages_of(0, 3)), Load(0xFD000000, page_of(9))], _NOTES, gap=b"gap")
_HEADERS = 64
_NOTE = _HEADERS + 3 * 56

SAMPLES = [
    Sample.of_file(
        "elf-core",
        "elf-core",
        _CORE,
        (
            Length("e_phentsize", 54, 2, "little", refused=(0, 32)),
            Length("e_phnum", 56, 2, "little", refused=(0, 200)),
            Length("p_filesz of the notes", _HEADERS + 32, 8, "little", refused=(1, 17)),
            Length("p_filesz of memory", _HEADERS + 56 + 32, 8, "little", refused=(1 << 20,)),
            Length("n_namesz", _NOTE, 4, "little"),
            Length("n_descsz", _NOTE + 4, 4, "little"),
        ),
    ),
    Sample.of_file(
        "elf-core-32",
        "elf-core",
        elf_core([Load(0x1000, pages_of(0, 2))], qemu_note(0, cr0=0x11), bits=32, machine=EM_386, many=True),
        (Length("sh_info", 52 + 28, 4, "little", refused=(1 << 17,)),),
    ),
]
