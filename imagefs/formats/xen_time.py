"""Which pages of a Xen guest hold a vcpu_info: Xen must find them populated when the guest goes on.

A guest tells Xen where it wants its vcpu_info (VCPUOP_register_vcpu_info), and no record of the stream says where. But
each holds a ``struct vcpu_time_info`` (xen/include/public/xen.h), little-endian, in 8-byte alignment:

| offset | bytes | field             | value                                                              |
|-------:|------:|-------------------|--------------------------------------------------------------------|
|      0 |     4 | version           | even                                                               |
|      4 |     4 | padding           | 0                                                                  |
|      8 |     8 | tsc_timestamp     |                                                                    |
|     16 |     8 | system_time       |                                                                    |
|     24 |     4 | tsc_to_system_mul | 2^32 × 10^9 / (frequency of the TSC, shifted to between 1 and 2 GHz) |
|     28 |     1 | tsc_shift         | by how many bits, signed                                           |
|     29 |     1 | flags             | 0 to 3                                                             |
|     30 |     2 | padding           | 0                                                                  |

The frequency is in the stream (X86_TSC_INFO), so multiplier and shift are known to the bit (set_time_scale in
xen/arch/x86/time.c). What is found is a hint: a host that corrects its TSC's frequency gives guests another multiplier.
"""

from __future__ import annotations

import struct

from imagefs.image.capture import ByteSource
from imagefs.image.geometry import PAGE_SIZE

MAX_PAGES = 1024

_WINDOW = 1 << 20
_BEFORE = 24
_TIME = struct.Struct("<IIQQIbBH")


def find_time_pages(memory: ByteSource, khz: int) -> list[int]:
    """Ascending page numbers of ``memory``, at most MAX_PAGES; ``khz`` is the frequency of the guest's TSC."""
    if not khz:
        return []
    pattern = _scale(khz * 1000)
    found: dict[int, None] = {}
    at = memory.next_data(0)
    while at < memory.size and len(found) < MAX_PAGES:
        at -= at % PAGE_SIZE
        window = bytes(memory.read_at(at, _WINDOW))
        place = window.find(pattern)
        while place >= 0 and len(found) < MAX_PAGES:
            if _is_time(window, place - _BEFORE):
                found[(at + place) // PAGE_SIZE] = None
            place = window.find(pattern, place + 1)
        at = memory.next_data(at + _WINDOW)
    return list(found)


def _scale(frequency: int) -> bytes:
    """The multiplier and shift that Xen gives the guest."""
    shift = 0
    while frequency > 2_000_000_000:
        frequency >>= 1
        shift -= 1
    while frequency <= 1_000_000_000:
        frequency <<= 1
        shift += 1
    return struct.pack("<Ib", (1_000_000_000 << 32) // frequency, shift)


def _is_time(window: bytes, at: int) -> bool:
    if at < 0 or at % 8 or at + _TIME.size > len(window):
        return False
    version, padding, _, _, _, _, flags, rest = _TIME.unpack_from(window, at)
    return not (version & 1 or padding or flags > 3 or rest)
