"""The native page operations, checked and typed; what they do and promise is in ``native/pages.h``.

A buffer is any object with the buffer protocol and contiguous bytes (bytes, bytearray, memoryview, mmap). In
a bitmap, page i is bit i % 8, least significant first, of byte i // 8. All calls release the GIL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagefs._native import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from imagefs._native import CData

PAGE_SIZE = lib.IMAGEFS_PAGE_SIZE

_scratch = ffi.new_allocator(should_clear_after_alloc=False)


def scan(buf: Buffer) -> bytes:
    """The bitmap of the pages of ``buf`` that hold a byte other than zero.

    ValueError where ``buf`` is not made of whole pages.
    """
    source = _bytes_of(buf)
    pages = _whole_pages("buffer", len(source))
    bitmap = _scratch("uint8_t[]", _bitmap_size(pages))
    lib.imagefs_scan(source, pages, bitmap)
    return bytes(ffi.buffer(bitmap))


def page_digests(buf: Buffer) -> bytes:
    """The BLAKE3 digests of the pages of ``buf``, end to end.

    ValueError where ``buf`` is not made of whole pages.
    """
    source = _bytes_of(buf)
    pages = _whole_pages("buffer", len(source))
    out = _scratch("uint8_t[]", pages * lib.IMAGEFS_DIGEST_SIZE)
    lib.imagefs_blake3_pages(source, pages, out)
    return bytes(ffi.buffer(out))


def compact(buf: Buffer, bitmap: Buffer) -> bytes:
    """The pages of ``buf`` whose bits are set, end to end.

    ValueError where ``buf`` is not made of whole pages, or ``bitmap`` is not one bit a page.
    """
    source, bits = _bytes_of(buf), _bytes_of(bitmap)
    pages = _whole_pages("buffer", len(source))
    _check_bitmap(bits, pages)
    out = _scratch("uint8_t[]", lib.imagefs_bits_count(bits, 0, pages) * PAGE_SIZE)
    lib.imagefs_compact(source, pages, bits, out)
    return bytes(ffi.buffer(out))


def expand(data: Buffer, bitmap: Buffer, pages: int) -> bytes:
    """The inverse of :func:`compact`: ``pages`` pages, those without a bit all zeros.

    ValueError where ``bitmap`` is not one bit a page, or ``data`` not one page for each bit that is set.
    """
    source, bits = _bytes_of(data), _bytes_of(bitmap)
    if pages < 0:
        raise ValueError(f"{pages} pages: cannot be negative")
    _check_bitmap(bits, pages)
    expected = lib.imagefs_bits_count(bits, 0, pages) * PAGE_SIZE
    if len(source) != expected:
        raise ValueError(f"data of {len(source)} bytes: the bitmap's pages take {expected}")
    out = _scratch("uint8_t[]", pages * PAGE_SIZE)
    lib.imagefs_expand(source, pages, bits, out)
    return bytes(ffi.buffer(out))


def bits_set(bits: Buffer, first: int, count: int) -> None:
    """Set ``count`` bits from bit ``first`` on, atomically; other threads and processes may share ``bits``.

    Whatever this thread wrote before is visible to those who then find the bits set. ValueError where the run
    leaves ``bits``; BufferError where ``bits`` is read-only.
    """
    target = ffi.from_buffer("uint8_t[]", bits, require_writable=True)
    _check_run(target, first, count)
    lib.imagefs_bits_set(target, first, count)


def bits_all(bits: Buffer, first: int, count: int) -> bool:
    """Whether ``count`` bits from bit ``first`` on are all set. ValueError where the run leaves ``bits``."""
    source = _bytes_of(bits)
    _check_run(source, first, count)
    return bool(lib.imagefs_bits_all(source, first, count))


def bits_count(bits: Buffer, first: int, count: int) -> int:
    """How many of ``count`` bits from bit ``first`` on are set. ValueError where the run leaves ``bits``."""
    source = _bytes_of(bits)
    _check_run(source, first, count)
    return lib.imagefs_bits_count(source, first, count)


def _bytes_of(buffer: Buffer) -> CData:
    return ffi.from_buffer("uint8_t[]", buffer)


def _whole_pages(what: str, size: int) -> int:
    pages, rest = divmod(size, PAGE_SIZE)
    if rest:
        raise ValueError(f"{what} of {size} bytes: not a multiple of the page size, {PAGE_SIZE}")
    return pages


def _bitmap_size(pages: int) -> int:
    return (pages + 7) // 8


def _check_bitmap(bitmap: CData, pages: int) -> None:
    if len(bitmap) != _bitmap_size(pages):
        raise ValueError(f"bitmap of {len(bitmap)} bytes: {pages} pages take {_bitmap_size(pages)}")


def _check_run(bits: CData, first: int, count: int) -> None:
    if first < 0 or count < 0 or first + count > 8 * len(bits):
        raise ValueError(f"bits {first} to {first + count} of a bitmap of {8 * len(bits)} bits")
