"""Machine types: what QEMU lists, and which one a guest gets."""

from __future__ import annotations

import pytest

from imagefs.errors import RestoreError
from imagefs.restore.qemu_machine import Machines, choose_machine, parse_machine_help

HELP = """Supported machines are:
microvm              microvm (i386)
pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-10.0)
pc-i440fx-10.0       Standard PC (i440FX + PIIX, 1996) (default)
pc-i440fx-7.2        Standard PC (i440FX + PIIX, 1996)
pc-i440fx-2.12       Standard PC (i440FX + PIIX, 1996) (deprecated)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-10.0)
pc-q35-10.0          Standard PC (Q35 + ICH9, 2009)
pc-q35-4.0.1         Standard PC (Q35 + ICH9, 2009)
none                 empty machine
"""
MACHINES = parse_machine_help("qemu", HELP)


def machines() -> Machines:
    return MACHINES


def test_help() -> None:
    assert MACHINES.aliases == {"pc": "pc-i440fx-10.0", "q35": "pc-q35-10.0"}
    assert MACHINES.types == {
        "microvm",
        "pc-i440fx-10.0",
        "pc-i440fx-7.2",
        "pc-i440fx-2.12",
        "pc-q35-10.0",
        "pc-q35-4.0.1",
        "none",
    }


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, "pc-i440fx-7.2"),
        (None, "pc-q35-4.0.1"),
        ("pc", "pc-i440fx-7.2"),
        ("pc", "pc-i440fx-10.0"),
        ("pc", "pc-i440fx-2.12"),
        ("q35", "pc-q35-4.0.1"),
        ("pc-i440fx-7.2", "pc-i440fx-7.2"),
        ("microvm", "microvm"),
    ],
)
def test_machine_of_the_image_is_chosen(given: str | None, wanted: str) -> None:
    assert choose_machine(given, wanted, machines) == wanted


@pytest.mark.parametrize(
    ("given", "wanted", "says"),
    [
        ("q35", "pc-i440fx-7.2", r"saved on machine pc-i440fx-7\.2, the command line says q35 \(pc-q35-10\.0\)"),
        ("pc-i440fx-10.0", "pc-i440fx-7.2", r"saved on machine pc-i440fx-7\.2, the command line says pc-i440fx-10\.0:"),
        ("microvm", "pc-i440fx-7.2", "the command line says microvm"),
        ("microvm", "pc-i440fx-10.1", r"pc-i440fx-10\.1, which qemu does not have"),
    ],
)
def test_machine_that_cannot_match(given: str | None, wanted: str, says: str) -> None:
    with pytest.raises(RestoreError, match=says):
        choose_machine(given, wanted, machines)


@pytest.mark.parametrize("given", [None, "pc", "pc-i440fx-7.2"])
def test_machine_that_can_only_be_the_image_s_needs_no_list(given: str | None) -> None:
    def fail() -> Machines:
        raise AssertionError("asked")

    assert choose_machine(given, "pc-i440fx-7.2", fail) == "pc-i440fx-7.2"
