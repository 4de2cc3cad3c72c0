"""Cloud Hypervisor snapshots, in the three ways in which its versions write their state."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from tests.unit.samples import Sample
from tests.unit.streams import page_of

RANGES = ((0, 3 * 4096), (1 << 32, 4096))
MEMORY = page_of(1) + bytes(4096) + page_of(2) + page_of(3)
CONFIG = {"cpus": {"boot_vcpus": 1, "max_vcpus": 1}, "memory": {"size": len(MEMORY)}, "payload": {"kernel": "vmlinux"}}


def state(data: Any) -> dict[str, Any]:
    """state.json with this ``snapshot_data`` of the memory manager, and another component."""
    cpus = {"snapshots": {}, "snapshot_data": {"state": '{"vcpus":[]}'}}
    manager = {"snapshots": {}, "snapshot_data": data}
    return {"snapshots": {"cpu-manager": cpus, "memory-manager": manager}, "snapshot_data": None}


def data_v39(ranges: Sequence[tuple[int, int]] = RANGES) -> dict[str, str]:
    table = {"data": [{"gpa": address, "length": length} for address, length in ranges]}
    return {"state": json.dumps({"memory_ranges": table, "boot_ram": len(MEMORY), "selected_slot": 0})}


def data_v29(ranges: Sequence[tuple[int, int]] = RANGES) -> list[int]:
    packed = struct.pack("<Q", len(ranges)) + b"".join(struct.pack("<QQ", *each) for each in ranges)
    return list(packed + bytes(range(40)))


def data_v28(ranges: Sequence[tuple[int, int]] = RANGES) -> dict[str, Any]:
    section = "memory-manager-section"
    return {section: {"id": section, "snapshot": data_v29(ranges)}}


def files(data: Any) -> dict[str, bytes]:
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "state.json": json.dumps(state(data)).encode(),
        "memory-ranges": MEMORY,
    }


SAMPLES = [
    Sample("cloud-hypervisor", "cloud-hypervisor", files(data_v39())),
    Sample("cloud-hypervisor-29", "cloud-hypervisor", files(data_v29())),
    Sample("cloud-hypervisor-28", "cloud-hypervisor", files(data_v28())),
]
