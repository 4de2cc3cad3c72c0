"""How much RAM the firmware of a QEMU PC was told of: what NUMA nodes and plugged modules are told apart by.

In the device state of a migration stream, section ``mc146818rtc`` (hw/rtc/mc146818rtc.c) begins with the 128 bytes of
CMOS memory, into which hw/i386/pc.c puts what SeaBIOS reads, little-endian:

| bytes       | field          | meaning                                              |
|-------------|----------------|------------------------------------------------------|
| 0x34 – 0x35 | memory         | above 16 MiB and below 4 GiB, in 64 KiB              |
| 0x5b – 0x5d | high memory    | above 4 GiB, in 64 KiB                               |

Memory that was plugged in is not in it.
"""

from __future__ import annotations

import re

from imagefs.image.capture import ByteSource

_SECTION = re.compile(rb"\x04.{4}\x0bmc146818rtc\x00{4}\x00{3}.(?P<cmos>.{128})", re.DOTALL)
_SEARCHED = 4 << 20
"""Bytes of the device sections: some 10 KiB are usual, and the clock is among the first."""
_LOW, _UNIT = 16 << 20, 64 << 10


def ram_told(state: ByteSource, start: int) -> int | None:
    """Bytes of RAM, or None where the device sections, from ``start`` of ``state`` on, do not tell."""
    found = list(_SECTION.finditer(bytes(state.read_at(start, _SEARCHED))))
    if len(found) != 1:
        return None
    cmos = found[0]["cmos"]
    below = int.from_bytes(cmos[0x34:0x36], "little")
    above = int.from_bytes(cmos[0x5B:0x5E], "little")
    return _LOW + (below + above) * _UNIT if below else None
