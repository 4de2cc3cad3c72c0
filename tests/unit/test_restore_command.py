"""The user's QEMU command line, made to resume an image."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.errors import RestoreError, UsageError
from imagefs.restore.mountpoint import RestoreImage
from imagefs.restore.qemu_command import Command, restore_command
from imagefs.restore.qemu_machine import Machines
from imagefs.restore.qemu_options import Option, merged, parse_arguments


def image(**changed: Any) -> RestoreImage:
    base = {"mountpoint": Path("/mnt/vm1"), "machine": "pc-i440fx-7.2", "ram_block": "ram", "ram_bytes": 512 << 20}
    return RestoreImage(**{**base, "cpus": 2, **changed})


IMAGE = image()
MACHINES = Machines("qemu", frozenset({"pc-i440fx-7.2", "pc-q35-7.2"}), {"pc": "pc-i440fx-7.2", "q35": "pc-q35-7.2"})
BACKEND = "memory-backend-file,id=ram,size=512M,mem-path=/mnt/vm1/memory,share=off"


def rewrite(line: str, image: RestoreImage = IMAGE) -> Command:
    return restore_command(shlex.split(line), image, "exec:cat state", lambda: MACHINES)


def options(line: str, image: RestoreImage = IMAGE) -> dict[str, list[str | None]]:
    """Values by option name, in order."""
    found: dict[str, list[str | None]] = {}
    for option in parse_arguments(rewrite(line, image).arguments[1:]):
        found.setdefault(option.name or "", []).append(option.value)
    return found


def test_nothing_said() -> None:
    assert rewrite("qemu").arguments == (
        *("qemu", "-machine", "pc-i440fx-7.2,memory-backend=ram", "-m", "size=512M", "-smp", "2"),
        *("-object", BACKEND, "-incoming", "exec:cat state"),
    )


def test_rest_stays_as_it_is() -> None:
    line = "qemu -nographic -append 'a, -machine q35' -machine pc -drive file=a,,b.img,if=virtio -S -m 512 -smp 2 c.img"
    assert rewrite(line).arguments == (
        *("qemu", "-nographic", "-append", "a, -machine q35", "-machine", "pc-i440fx-7.2,memory-backend=ram"),
        *("-drive", "file=a,,b.img,if=virtio", "-S", "-m", "512", "-smp", "2", "c.img"),
        *("-object", BACKEND, "-incoming", "exec:cat state"),
    )


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("-machine pc", "pc-i440fx-7.2,memory-backend=ram"),
        ("-M pc-i440fx-7.2", "pc-i440fx-7.2,memory-backend=ram"),
        ("--machine type=pc,accel=tcg", "pc-i440fx-7.2,accel=tcg,memory-backend=ram"),
        ("-machine accel=kvm:tcg,usb=off", "pc-i440fx-7.2,accel=kvm:tcg,usb=off,memory-backend=ram"),
        ("-machine q35 -M pc,usb=off -machine accel=tcg", "pc-i440fx-7.2,usb=off,accel=tcg,memory-backend=ram"),
        ("-machine pc,memory-backend=mem0", "pc-i440fx-7.2,memory-backend=ram"),
        ("-machine pc,firmware=/a,,b", "pc-i440fx-7.2,firmware=/a,,b,memory-backend=ram"),
    ],
)
def test_machine(given: str, wanted: str) -> None:
    assert options(f"qemu {given}")["machine"] == [wanted]
    assert "M" not in options(f"qemu {given}")


def test_machine_that_cannot_match() -> None:
    with pytest.raises(RestoreError, match=r"pc-i440fx-7\.2, the command line says q35 \(pc-q35-7\.2\)"):
        rewrite("qemu -M q35 -m 512")


@pytest.mark.parametrize(
    "given", ["-m 512", "-m 512M", "-m 0.5G", "-m size=512,slots=2,maxmem=4G", "-m 1G -m 512", "-m slots=2 -m 524288K"]
)
def test_size_that_fits(given: str) -> None:
    found = options(f"qemu {given}")["m"]
    assert found == [option.value for option in parse_arguments(given.split())]


@pytest.mark.parametrize("given", ["-m 1G", "-m 511", "-m size=1G,slots=2", "-m 512 -m 1G"])
def test_size_that_does_not_fit(given: str) -> None:
    with pytest.raises(RestoreError, match=r"^-m (1G|511): that is [\d,]+ bytes of RAM, the image has 536,870,912"):
        rewrite(f"qemu {given}")


def test_size_that_is_none() -> None:
    with pytest.raises(RestoreError, match="'lots' is no size"):
        rewrite("qemu -m lots")


def test_size_that_is_missing_beside_other_keys() -> None:
    found = parse_arguments(rewrite("qemu -m slots=2,maxmem=4G").arguments[1:])
    assert merged(found, ("m",), "size") == {"slots": "2", "maxmem": "4G", "size": "512M"}


@pytest.mark.parametrize(
    ("machine", "backend"),
    [
        ("pc,memory-backend=ram", "memory-backend-file,id=ram,size=512M,mem-path=/dev/shm/vm1,share=on"),
        ("pc,memory-backend=mem0", "memory-backend-ram,id=mem0,size=0.5G,prealloc=on"),
        ("pc", "memory-backend-memfd,id=ram,size=536870912,share=on"),
        ("pc,memory-backend=ram", shlex.quote('{"qom-type":"memory-backend-ram","id":"ram","size":536870912}')),
    ],
)
def test_backend_is_replaced(machine: str, backend: str) -> None:
    found = options(f"qemu -object rng-builtin,id=rng -object {backend} -machine {machine}")
    assert found["object"] == ["rng-builtin,id=rng", BACKEND]
    assert found["machine"] == ["pc-i440fx-7.2,memory-backend=ram"]


@pytest.mark.parametrize(
    "backend",
    [
        "memory-backend-ram,id=ram,size=512M,prealloc=on,host-nodes=0,host-nodes=1-2,policy=bind,dump=off",
        "'" + json.dumps({"qom-type": "memory-backend-ram", "id": "ram", "host-nodes": [0, 1], "merge": False}) + "'",
    ],
)
def test_placement_of_pages_stays(backend: str) -> None:
    (found,) = options(f"qemu -object {backend}")["object"]
    assert found is not None
    kept = found.removeprefix(BACKEND)
    assert kept in (",host-nodes=0,host-nodes=1-2,policy=bind,dump=off", ",merge=off,host-nodes=0,host-nodes=1")


def test_backend_of_another_size() -> None:
    with pytest.raises(RestoreError, match=r"-object memory-backend-ram,id=ram,size=1G: that is 1,073,741,824 bytes"):
        rewrite("qemu -object memory-backend-ram,id=ram,size=1G -machine pc,memory-backend=ram")


def test_other_object_of_that_name() -> None:
    with pytest.raises(RestoreError, match=r"-object rng-builtin,id=ram: the image's RAM needs this id"):
        rewrite("qemu -object rng-builtin,id=ram")


def test_other_memory_stays() -> None:
    """Not guest RAM: shared memory of a device."""
    other = "memory-backend-file,id=shm,size=1M,mem-path=/dev/shm/x,share=on"
    assert options(f"qemu -object {other} -device ivshmem-plain,memdev=shm")["object"] == [other, BACKEND]


def test_ram_of_the_machine_itself() -> None:
    """Default RAM is the block ``pc.ram``; the id of ours makes it the same block."""
    found = options("qemu -machine pc", image(ram_block="pc.ram"))
    assert found["machine"] == ["pc-i440fx-7.2,memory-backend=pc.ram"]
    assert found["object"] == [BACKEND.replace("id=ram", "id=pc.ram")]


def test_block_name_of_old_machine_types() -> None:
    """Up to machine types of 4.0 blocks of backends bear the object's path."""
    assert options("qemu", image(ram_block="/objects/ram"))["object"] == [BACKEND]


def test_options_that_say_where_ram_is_are_left_out() -> None:
    command = rewrite("qemu -mem-path /dev/hugepages -mem-prealloc -nographic")
    assert not {"-mem-path", "/dev/hugepages", "-mem-prealloc"} & set(command.arguments)
    assert [note.split(" ")[0] for note in command.notes] == ["-mem-path", "-mem-prealloc"]


def test_commas_in_the_mountpoint_are_doubled() -> None:
    (found,) = options("qemu", image(mountpoint=Path("/mnt/a,b")))["object"]
    assert found == BACKEND.replace("/mnt/vm1", "/mnt/a,,b")


@pytest.mark.parametrize("given", ["-incoming defer", "-incoming tcp:0:4444", "-loadvm before"])
def test_other_sources_of_state_are_refused(given: str) -> None:
    with pytest.raises(RestoreError, match=f"^{given}: leave it out"):
        rewrite(f"qemu {given}")


@pytest.mark.parametrize(
    "given",
    [
        "-numa node,memdev=ram",
        "-numa node,nodeid=0,mem=512M",
        "-numa node -numa node",
        "-numa type=node,cpus=0 -numa dist,src=0,dst=1,val=20 -numa node,cpus=1",
    ],
)
def test_numa_is_refused(given: str) -> None:
    with pytest.raises(RestoreError, match="NUMA"):
        rewrite(f"qemu {given}")


def test_one_node_without_memory_of_its_own() -> None:
    assert options("qemu -numa node,nodeid=0")["numa"] == ["node,nodeid=0"]


@pytest.mark.parametrize("given", ["-smp 2", "-smp cpus=2,maxcpus=4", "-smp sockets=2,cores=1", "-smp 1 -smp 2"])
def test_cpus_that_fit(given: str) -> None:
    assert options(f"qemu {given}")["smp"] == given.removeprefix("-smp ").split(" -smp ")


def test_cpus_that_do_not_fit() -> None:
    with pytest.raises(RestoreError, match="-smp 4: the image has 2 CPUs"):
        rewrite("qemu -smp 4,sockets=1")


def test_cpus_that_are_plugged_in_are_not_counted() -> None:
    assert options("qemu -smp 1,maxcpus=2 -device qemu64-x86_64-cpu,core-id=1")["smp"] == ["1,maxcpus=2"]


def test_cpus_that_the_image_does_not_know() -> None:
    assert "smp" not in options("qemu", image(cpus=None))


def test_sandbox_in_which_the_state_cannot_be_read() -> None:
    with pytest.raises(RestoreError, match="-sandbox spawn=deny: QEMU runs a shell"):
        rewrite("qemu -sandbox on,obsolete=deny,spawn=deny")
    assert options("qemu -sandbox on,obsolete=deny")["sandbox"] == ["on,obsolete=deny"]


def test_no_command() -> None:
    with pytest.raises(UsageError, match="command line is missing"):
        restore_command([], IMAGE, "", lambda: MACHINES)


WORDS = st.lists(
    st.one_of(
        st.sampled_from(["-S", "-nographic", "-daemonize", "disk.img"]).map(lambda word: [word]),
        st.tuples(st.sampled_from(["-append", "-name", "-drive", "-device", "-serial", "-x"]), st.text()).map(list),
        st.sampled_from(["pc", "type=pc", "accel=tcg,usb=off"]).map(lambda value: ["-machine", value]),
        st.sampled_from(["512", "size=0.5G", "slots=1"]).map(lambda value: ["-m", value]),
    ),
    max_size=8,
)


@given(WORDS)
def test_any_command_line(words: list[list[str]]) -> None:
    """All that is not ours to change is there, in its order, and there is one answer to each question of ours."""
    line = [word for group in words for word in group]
    done = parse_arguments(restore_command(["qemu", *line], IMAGE, "exec:x", lambda: MACHINES).arguments[1:])
    ours = {"machine", "M", "m", "smp", "object", "incoming"}

    def others(given: list[Option]) -> list[Option]:
        return [option for option in given if option.name not in ours]

    assert others(done) == others(parse_arguments(line))
    assert merged(done, ("machine",), "type")["type"] == "pc-i440fx-7.2"
    assert merged(done, ("machine",), "type")["memory-backend"] == "ram"
    assert merged(done, ("m",), "size")["size"] in ("512", "0.5G", "512M")
    assert [option.value for option in done if option.name in ("object", "incoming")] == [BACKEND, "exec:x"]
