"""The registers of each vCPU, found in device state that a description explains."""

from __future__ import annotations

import json
import logging
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from imagefs.formats import open_capture
from imagefs.formats.qemu_cpu import find_vcpus
from imagefs.image.capture import BytesSource
from imagefs.image.vcpu import Mode, VcpuState
from tests.unit.streams import Options, Record, build, page_of

GENUINE = Path(__file__).resolve().parents[3] / "shared" / "data" / "qemu-7.2-pc-256m.migration.zst"
"""A stopped Linux guest of 256 MiB that QEMU 7.2 saved; it is beside the repository, not in it."""


def counted(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


@dataclass
class Structure:
    """Data and their description, as QEMU writes both in one go (migration/vmstate.c)."""

    name: str
    version: int = 1
    data: bytes = b""
    fields: list[dict[str, Any]] = field(default_factory=list)
    subsections: list[dict[str, Any]] = field(default_factory=list)

    def scalar(self, name: str, value: int, size: int = 8) -> Structure:
        self.data += value.to_bytes(size, "big")
        self.fields.append({"name": name, "type": f"uint{8 * size}", "size": size})
        return self

    def array(self, name: str, values: Sequence[int], size: int) -> Structure:
        self.data += b"".join(value.to_bytes(size, "big") for value in values)
        self.fields.append({"name": name, "array_len": len(values), "type": f"uint{8 * size}", "size": size})
        return self

    def buffer(self, name: str, data: bytes) -> Structure:
        self.data += data
        self.fields.append({"name": name, "type": "buffer", "size": len(data)})
        return self

    def structures(self, name: str, elements: Sequence[Structure], indexed: bool = False) -> Structure:
        """An array of structures: one field, or, as where their descriptions differ, a field for each."""
        shape = elements[0].described
        for number, element in enumerate(elements):
            self.data += element.data
            kind = {"index": number} if indexed else {"array_len": len(elements)}
            if indexed or not number:
                self.fields.append({"name": name, **kind, "type": "struct", "struct": shape, "size": len(element.data)})
        return self

    def structure(self, other: Structure, count: int = 1, index: int | None = None) -> Structure:
        self.data += count * other.data
        kind = {"array_len": count} if count > 1 else {} if index is None else {"index": index}
        described = {"name": other.name, **kind, "type": "struct", "struct": other.described, "size": len(other.data)}
        self.fields.append(described)
        return self

    def subsection(self, other: Structure) -> Structure:
        self.data += b"\x05" + counted(other.name) + struct.pack(">I", other.version) + other.data
        self.subsections.append(other.described)
        return self

    @property
    def described(self) -> dict[str, Any]:
        described = {"vmsd_name": self.name, "version": self.version, "fields": self.fields}
        return described | ({"subsections": self.subsections} if self.subsections else {})


@dataclass
class State:
    """Device sections in order. ``data`` begins with something else, as the state does."""

    footers: bool = True
    data: bytes = b"QEVM and RAM"
    devices: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = len(self.data)

    def add(self, name: str, content: Structure, instance: int = 0) -> State:
        self._section(name, instance, content.version, content.data)
        self.devices.append({"name": name, "instance_id": instance, **content.described})
        return self

    def add_old_style(self, name: str, data: bytes) -> State:
        """A device without a vmsd: no version in the description."""
        self._section(name, 0, 7, data)
        fields = [{"name": "data", "size": len(data), "type": "buffer"}]
        self.devices.append({"name": name, "instance_id": 0, "size": len(data), "fields": fields})
        return self

    def _section(self, name: str, instance: int, version: int, data: bytes) -> None:
        number = 30 + len(self.devices)
        self.data += b"\x04" + struct.pack(">I", number) + counted(name) + struct.pack(">II", instance, version) + data
        if self.footers:
            self.data += b"\x7e" + struct.pack(">I", number)

    @property
    def description(self) -> dict[str, Any]:
        return {"page_size": 4096, "devices": self.devices}

    def find(self, end: bytes = b"\0") -> list[VcpuState]:
        return find_vcpus(Strict(self.data + end), self.start, self.description)


class Strict(BytesSource):
    """As files are: no negative offsets. And nobody who checks lengths reads past the end."""

    def read_at(self, offset: int, length: int) -> memoryview:
        assert 0 <= offset <= offset + length <= self.size
        return super().read_at(offset, length)


def cpu(vcpu: VcpuState, width: int = 8, indexed: bool = False) -> Structure:
    """As target/i386/machine.c has it, in short. qemu-system-i386 has 32-bit registers and no EFER."""

    def segment(selector: int, base: int, flags: int = 0x93 << 8) -> Structure:
        content = Structure("segment").scalar("selector", selector, 4).scalar("base", base, width)
        return content.scalar("limit", 0xFFFF, 4).scalar("flags", flags, 4)

    names = ("cr0", "cr3", "cr4", "rip", "rsp", "cs", "gdt_base", "idt_base")
    cr0, cr3, cr4, rip, rsp, cs, gdt, idt = (getattr(vcpu, name) for name in names)
    content = Structure("cpu", 12).array("env.regs", [0xAA, 0xCC, 0xDD, 0xBB, rsp, 0xEE, 6, 7], width)
    content.scalar("env.eip", rip, width).scalar("env.hflags", 0x40000, 4)
    segments = [segment(0x18 + number, number) for number in range(6)]
    segments[1] = segment(cs, 0, 0x9B << 8 | (vcpu.mode == "long") << 21)
    content.structures("env.segs", segments, indexed)
    for name, base in {"env.ldt": 0x1111, "env.tr": 0x2222, "env.gdt": gdt, "env.idt": idt}.items():
        content.structures(name, [segment(0, base)])
        del content.fields[-1]["array_len"]
    content.scalar("env.cr[0]", cr0, width).scalar("env.cr[2]", 0x7EEF, width)
    content.scalar("env.cr[3]", cr3, width).scalar("env.cr[4]", cr4, width)
    content.array("env.dr", [0x7E] * 8, width).scalar("env.a20_mask", 0xFFFFFFFF, 4)
    if width == 8:
        content.scalar("env.efer", vcpu.efer or 0)
    content.subsection(Structure("cpu/poll_control_msr").scalar("env.poll_control_msr", 1))
    nested = Structure("cpu/nested_state").subsection(Structure("cpu/nested_state/inner", 3).array("x", [1, 2], 2))
    return content.subsection(nested)


def kernel(
    number: int = 0,
    *,
    cr0: int = 0x80050033,
    cr3: int = 0x2870000,
    cr4: int = 0x6B0,
    efer: int | None = 0xD01,
    mode: Mode = "long",
) -> VcpuState:
    """A vCPU in Linux' idle loop."""
    shift = 1 << 40 if efer is not None else 0
    addresses = (0x0404_0404 + shift + number, 0x0505_0000 + shift, 0x10, 0x0606_0000 + shift, 0x0707_0000)
    return VcpuState(cr0, cr3 + 0x1000 * number, cr4, efer, *addresses, mode)


PAGING = [kernel(number) for number in range(4)]


def machine(footers: bool = True, vcpus: int = 3) -> State:
    state = State(footers)
    state.add("timer", Structure("timer", 2).scalar("cpu_ticks_offset", 5).buffer("unused", bytes(8)))
    state.add_old_style("slirp", b"\x7e\0\0\0\x1f\4")
    for number in range(vcpus):
        state.add("cpu_common", Structure("cpu_common").scalar("halted", 0, 4), number)
        state.add("cpu", cpu(PAGING[number]), number)
    ide = Structure("ide", 3)
    for index in range(2):
        ide.structure(Structure("bmdma").buffer("data", bytes(index + 1)), index=index)
    return state.add("0000:00:01.1/ide", ide).add("empty", Structure("empty"))


@pytest.mark.parametrize("footers", [True, False])
@pytest.mark.parametrize("vcpus", [0, 1, 3])
def test_vcpus_among_devices(footers: bool, vcpus: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "imagefs")
    assert machine(footers, vcpus).find() == PAGING[:vcpus]
    assert not caplog.records


def test_vcpu_is_plugged_in_last() -> None:
    assert machine().add("cpu", cpu(PAGING[3]), 3).find() == PAGING


def test_32_bit_qemu() -> None:
    vcpu = kernel(cr0=0x80000011, cr3=0x1000, cr4=0x90, efer=None, mode="protected")
    assert State().add("cpu", cpu(vcpu, width=4)).find() == [vcpu]
    assert vcpu.levels == 2


@pytest.mark.parametrize(
    ("vcpu", "levels"),
    [
        (kernel(cr0=0x60000010, cr3=0, cr4=0, efer=0, mode="real"), 0),
        (kernel(cr0=0x60000011, cr4=0, efer=0, mode="protected"), 0),
        (kernel(efer=0x900, mode="protected"), 3),
        (kernel(efer=0xD00, mode="compatibility"), 4),
        (kernel(cr4=0x16B0), 5),
    ],
)
@pytest.mark.parametrize("indexed", [True, False])
def test_modes(vcpu: VcpuState, levels: int, indexed: bool) -> None:
    assert State().add("cpu", cpu(vcpu, indexed=indexed)).find() == [vcpu]
    assert vcpu.levels == levels


def test_a_vcpu_without_some_of_the_registers() -> None:
    content = Structure("cpu", 12).scalar("env.cr[0]", 0x80050033).scalar("env.cr[3]", 0x5000)
    assert State().add("cpu", content).find() == []
    content.scalar("env.cr[4]", 0x6B0)
    assert State().add("cpu", content).find() == [VcpuState(0x80050033, 0x5000, 0x6B0, mode="protected")]


def test_other_architectures() -> None:
    state = State().add("cpu", Structure("cpu", 22).array("env.regs", range(16), 4).scalar("env.spsr", 1, 4))
    assert state.find() == []


def test_registers_of_another_size() -> None:
    assert State().add("cpu", cpu(PAGING[0], width=16)).find() == []


@pytest.mark.parametrize("size", [-1, -10_000, 1 << 70, "8", 8.0, None])
def test_impossible_sizes(size: object) -> None:
    state = machine()
    state.devices[2]["fields"][0]["size"] = size
    assert state.find() == []


def test_what_follows_the_last_vcpu_is_not_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "imagefs")
    state = machine()
    state.devices[-1] = {"name": 5}
    state.data = state.data[: state.data.index(b"0000:00:01.1/ide")]
    assert state.find(b"") == PAGING[:3]
    assert not caplog.records


def test_sections_that_are_not_as_described(caplog: pytest.LogCaptureFixture) -> None:
    """What came before them is found; the log says why there is no more."""
    caplog.set_level(logging.INFO, "imagefs")
    state = machine()
    state.devices[4]["fields"][0]["size"] += 1  # the second cpu_common: 4 bytes in truth
    assert state.find() == PAGING[:1]
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert re.fullmatch(
        r"vCPUs after the first 1 are not looked at: ValueError: no section 'cpu' before 0x[0-9a-f]+ of the state",
        record.getMessage(),
    )


@pytest.mark.parametrize(
    ("part", "replacement"),
    [
        (b"\x04\0\0\0\x1e", b"\x03\0\0\0\x1e"),
        (b"\x05timer", b"\x05tamer"),
        (b"timer\0\0\0\0", b"timer\0\0\0\1"),
        (b"timer\0\0\0\0\0\0\0\2", b"timer\0\0\0\0\0\0\0\3"),
        (b"\x7e\0\0\0\x1e", b"\x7e\0\0\0\x1d"),
    ],
)
def test_headers_are_checked(part: bytes, replacement: bytes) -> None:
    state = machine()
    assert state.data.count(part) == 1
    state.data = state.data.replace(part, replacement)
    assert state.find() == []


def test_cut_anywhere() -> None:
    """Nothing is raised, and nothing is found that is not there."""
    state = machine()
    whole = state.data
    counts = []
    for end in range(len(whole)):
        state.data = whole[:end]
        found = state.find(b"")
        assert found == PAGING[: len(found)]
        counts.append(len(found))
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2, 3}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(["cpu", "env.cr[3]", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "size", "fields"]), inner),
    max_leaves=8,
)


@given(st.data())
def test_any_description(data: st.DataObject) -> None:
    """Anything anywhere in it: no error, and in memory nothing but what the state has."""
    state = machine()
    description: Any = json.loads(json.dumps(state.description))
    place: Any = description
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(JSON)
        break
    found = find_vcpus(Strict(state.data + b"\0"), state.start, description)
    assert len(found) <= 4


def test_deep_description() -> None:
    deep: dict[str, Any] = {"vmsd_name": "x", "fields": []}
    for _ in range(100_000):
        deep = {"vmsd_name": "x", "fields": [], "subsections": [deep]}
    description: Mapping[str, Any] = {"devices": [{"name": "cpu", "instance_id": 0, **deep}]}
    state = b"\x04\0\0\0\1\3cpu" + bytes(8)
    assert find_vcpus(Strict(state), 0, description) == []


@pytest.mark.parametrize("described", [True, False])
def test_page_tables_of_a_stream(described: bool, tmp_path: Path) -> None:
    """Read with the stream, and found in memory whatever order its pages came in."""
    tables = {5: 2, 2: 3, 3: 6}
    pages = [Record("page", "pc.ram", page, page_of(page)) for page in range(8)]
    pages += [
        Record("page", "pc.ram", page, (after << 12 | 1).to_bytes(8, "little") * 512) for page, after in tables.items()
    ]
    content = cpu(kernel(cr3=0x5000))
    content.version = 1
    built = build([pages], Options(devices=[("cpu", 0, content.data)], description=False))
    data = built.data
    if described:
        text = json.dumps({"page_size": 4096, "devices": [{"name": "cpu", "instance_id": 0, **content.described}]})
        data += b"\x06" + struct.pack(">I", len(text)) + text.encode()
    (tmp_path / "save").write_bytes(data)
    with open_capture(tmp_path / "save", spool_dir=tmp_path) as capture:
        found = [(run.first, run.count, run.kind) for run in capture.essential]
    assert found == ([(2, 1, "pdpt"), (3, 1, "pd"), (5, 1, "pml4"), (6, 1, "pt")] if described else [])


def test_genuine_stream(tmp_path: Path) -> None:
    """QEMU's own description and data, where the sample is at hand; the synthetic machine otherwise."""
    if not GENUINE.exists():
        assert machine().find() == PAGING[:3]
        return
    with (
        GENUINE.open("rb") as packed,
        zstandard.ZstdDecompressor().stream_reader(packed) as stream,
        open_capture(stream, spool_dir=tmp_path) as capture,
    ):
        (vcpu,) = capture.vcpus
        assert (vcpu.cr0, vcpu.cr3, vcpu.cr4, vcpu.efer) == (0x80050033, 0x2870000, 0x6B0, 0xD01)
        assert (vcpu.rip, vcpu.rsp, vcpu.cs, vcpu.mode) == (0xFFFFFFFF9BA17A0B, 0xFFFFFFFF9CA03E98, 0x10, "long")
        assert (vcpu.gdt_base, vcpu.idt_base) == (0xFFFFFE0000001000, 0xFFFFFE0000000000)
        kinds: Counter[str] = Counter()
        for run in capture.essential:
            kinds[run.kind] += run.count
        assert kinds == {"pml4": 1, "pdpt": 71, "pd": 9, "pt": 27, "ktext": 3586}
