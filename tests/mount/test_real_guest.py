"""A Linux guest, saved by QEMU while it ran: its mounted image is its memory, and the file that QEMU wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.guest import build_guest
from support.nginx import Nginx
from support.vm import Vm

from imagefs.image.geometry import PAGE_SIZE
from tests.faults.images import RealImage, check_same, requests_to, split
from tests.faults.mounts import Mounter
from tests.mount.conftest import wait_until

MEMORY = 96 << 20
NOT_RAM = range(0xA0000 // PAGE_SIZE, 0x100000 // PAGE_SIZE)
"""Frames where a PC's CPU sees the screen and ROMs instead of RAM."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> RealImage:
    directory = tmp_path_factory.mktemp("guest")
    guest = build_guest(fill_mib=24, kind="mixed", seed=3)
    with Vm(guest, memory_mib=MEMORY >> 20) as vm:
        vm.expect("FILLED")
        vm.ping()
        # Throttled, so that the guest dirties pages between the rounds, and has some saved more than once.
        vm.qmp.execute("migrate-set-parameters", {"max-bandwidth": 32 << 20})
        vm.qmp.execute("migrate", {"uri": f"exec:cat > {directory}/vm.save"})
        wait_until(lambda: vm.status == "postmigrate", "it is saved", 60)
        vm.qmp.execute("pmemsave", {"val": 0, "size": MEMORY, "filename": f"{directory}/vm.memory"})
    return split(directory / "vm.save", directory / "store", "vm1", (directory / "vm.memory").read_bytes())


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounter]:
    with Mounter(tmp_path) as mounter:
        yield mounter


def test_guest(image: RealImage, mount: Mounter) -> None:
    with Nginx(image.store) as server:
        mounted = mount(f"{server.url}/vm1", "prefetch=none")
        begun = len(requests_to(server))
        document = json.loads((mounted.path / "metadata.json").read_text())
        assert [region["size"] for region in document["regions"]] == [MEMORY]
        assert document["restore"]["vmm"] == "qemu"
        # The guest's page tables are named, and were here before anything was asked for.
        tables = [
            page
            for first, count, kind in document["page_tables"]
            if kind != "ktext"
            for page in range(first, first + count)
        ]
        assert {kind for _, _, kind in document["page_tables"]} == {"pml4", "pdpt", "pd", "pt", "ktext"}
        assert len(tables) > 10
        for page in tables:
            assert mounted.xattr(page, "kind") in ("pml4", "pdpt", "pd", "pt")
            if any(image.page(page)):
                check_same(mounted.read_page(page), image.page(page), "page table", page)
        assert len(requests_to(server)) == begun

        assert mounted.run("cmp", "native", str(image.native)) == ""
        memory = (mounted.path / "memory").read_bytes()
        ram = bytearray(image.memory)
        hidden = slice(NOT_RAM.start * PAGE_SIZE, NOT_RAM.stop * PAGE_SIZE)
        ram[hidden] = memory[hidden]
        check_same(memory, bytes(ram), "memory")
        assert os.stat(mounted.path / "state").st_size < 2 << 20
        for page in range(0, image.pages, 97):
            if page not in NOT_RAM:
                check_same(mounted.read_page(page), image.page(page), "page", page)
