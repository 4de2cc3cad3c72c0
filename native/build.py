"""The extension module ``imagefs._native``: cffi in API mode over the C in this directory (setup.py names this file).

What Python sees of a header is what stands between its cdef marks, so that a declaration exists once.
"""

from pathlib import Path

from cffi import FFI

NATIVE = Path(__file__).resolve().parent
HEADERS = ["pages.h", "blake3.h", "chunks.h", "pager.h", "userfault.h"]
SOURCES = [
    "pages.c",
    "blake3.c",
    "chunks.c",
    "userfault.c",
    "pager.c",
    *(f"pager_{part}.c" for part in ["ahead", "create", "events", "fetch", "install", "source", "state", "trace"]),
]


def declarations(header: str) -> str:
    text = (NATIVE / header).read_text()
    return text.partition("/* cdef begin */")[2].partition("/* cdef end */")[0]


ffibuilder = FFI()
for name in HEADERS:
    ffibuilder.cdef(declarations(name))
ffibuilder.set_source(
    "imagefs._native",
    "".join(f'#include "{name}"\n' for name in HEADERS),
    # Relative: setuptools refuses absolute paths, and builds from the directory of setup.py.
    sources=[f"native/{name}" for name in SOURCES],
    include_dirs=["native"],
    depends=[f"native/{name}" for name in [*HEADERS, "pager_parts.h"]],
    extra_compile_args=["-std=c11", "-O3", "-Wall", "-fvisibility=hidden", "-pthread"],
    libraries=["zstd"],
    extra_link_args=["-pthread"],
)
