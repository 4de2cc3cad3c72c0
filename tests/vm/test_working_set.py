"""A guest's second resume, on another host: what it touches is there before it asks, by every door that maps memory."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.link import Link
from support.mounts import mounted
from support.nginx import Nginx

from tests.vm.restoring import Stored, checked, restored

MBIT, RTT_MS = 100.0, 10.0


@pytest.fixture
def slow(one: Stored) -> Iterator[Link]:
    with Nginx(one.store) as nginx, Link(nginx.address, MBIT, RTT_MS) as link:
        yield link


def resume(one: Stored, imagefs: list[str], door: str, mountpoint: Path, *, wait: bool) -> tuple[int, dict[str, Any]]:
    """Requests on demand until the guest answered, and the status then; its memory is checked."""

    def status() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((mountpoint / ".imagefs" / "status.json").read_text())
        return found

    with restored(one, imagefs, mountpoint, door=door) as vm:
        vm.go_on()
        nonce, count = vm.ping()
        then = status()
        assert nonce == one.nonce
        assert count >= one.count
        if wait:
            assert vm.ask("check") == checked(one)
        # In peace, so that neither QEMU nor a pager holds up the end of the mount.
        vm.process.terminate()
        vm.wait()
    return then["fetch"]["requests"] - then["fetch"]["background_requests"], then


@pytest.mark.parametrize("door", ["mmap", "pager"])
def test_the_second_resume_touches_nothing_remote(
    one: Stored, imagefs: list[str], slow: Link, tmp_path: Path, door: str
) -> None:
    source, mountpoint = f"{slow.url}/vm1", tmp_path / "mnt"
    with mounted(source, mountpoint, f"prefetch=none,cache={tmp_path}/first"):
        first, _ = resume(one, imagefs, door, mountpoint, wait=False)
        command = [*imagefs, "trace", "save", "--new", "-q", str(mountpoint), str(one.store / "vm1")]
        subprocess.run(command, check=True, timeout=60)
    assert first > 50
    try:
        with mounted(source, mountpoint, f"prefetch=ws,cache={tmp_path}/second"):
            second, status = resume(one, imagefs, door, mountpoint, wait=True)
    finally:
        subprocess.run([*imagefs, "trace", "remove", str(one.store / "vm1")], check=True, timeout=60)
    assert status["working_set"]["state"] == "complete"
    assert second < first / 5
