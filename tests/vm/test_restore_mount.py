"""The whole way: a guest suspended into a store, served, mounted, resumed from there; and once more."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.guest import Guest
from support.mounts import mounted
from support.nginx import Nginx
from support.vm import Vm

OPTIONS: dict[str, Any] = {"memory_mib": 192, "machine": "q35", "smp": 2}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Nginx]:
    (tmp_path / "store").mkdir()
    with Nginx(tmp_path / "store") as nginx:
        yield nginx


def suspend(imagefs: list[str], vm: Vm, target: Path) -> None:
    command = [*imagefs, "suspend", "--quit", "--quiet", "--qmp", str(vm.qmp_socket), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert (done.returncode, done.stderr) == (0, "")
    assert vm.wait() == 0


def test_guest_goes_on_from_a_web_server(guest: Guest, imagefs: list[str], server: Nginx, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with Vm(guest, **OPTIONS) as vm:
        vm.expect("FILLED")
        nonce, count = vm.ping()
        suspend(imagefs, vm, store / "vm1")
    stored = image_bytes(imagefs, store / "vm1")

    # Nothing in the background: what comes is what the guest touches.
    with (
        mounted(f"{server.url}/vm1", tmp_path / "mnt", f"prefetch=none,cache={tmp_path}/cache") as mountpoint,
        Vm(guest, prefix=[*imagefs, "restore", str(mountpoint), "--"], **OPTIONS) as vm,
    ):
        vm.wait_running()
        assert vm.ping()[0] == nonce
        assert sum(request.bytes for request in server.requests()) < stored / 4
        assert vm.ask("check") == f"ok pages={guest.fill_mib << 8} writes=0 nonce={nonce}"
        assert vm.ask("write 3000 9").startswith("ok")
        count = vm.ping()[1]
        suspend(imagefs, vm, store / "vm2")

    with (
        mounted(f"{server.url}/vm2", tmp_path / "mnt", f"prefetch=all,cache={tmp_path}/cache") as mountpoint,
        Vm(guest, prefix=[*imagefs, "restore", str(mountpoint), "--"], **OPTIONS) as vm,
    ):
        vm.wait_running()
        again = vm.ping()
        assert again[0] == nonce
        assert again[1] >= count
        assert vm.ask("check") == f"ok pages={guest.fill_mib << 8} writes=3000 nonce={nonce}"


def image_bytes(imagefs: list[str], image: Path) -> int:
    done = subprocess.run([*imagefs, "info", "--json", str(image)], capture_output=True, check=True, timeout=60)
    return int(json.loads(done.stdout)["stored_bytes"])
