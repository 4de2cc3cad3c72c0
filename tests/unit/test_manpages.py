"""The man pages are clean, and say what ``--help`` says: neither can drift from the other, nor from the parser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from imagefs.cli import COMMANDS
from imagefs.errors import UsageError
from imagefs.mount.options import parse_options

PAGES = Path(__file__).parents[2] / "docs" / "man"
IMAGEFS, MOUNT = PAGES / "imagefs.1", PAGES / "mount.imagefs.8"

COMMON = {"-h", "--help", "-v", "--verbose"}
"""Of every command; described once."""
FROM_MOUNT = {"-n", "-s", "-t"}
"""What mount(8) passes: in the page, but not for users to type."""

OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


@cache
def help_of(*command: str) -> str:
    """What ``--help`` prints, in lines as long as can be."""
    done = subprocess.run(
        [sys.executable, "-m", *command, "--help"],
        env={**os.environ, "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def options_in_help(text: str) -> set[str]:
    """Out of argparse's list: two blanks, the options, two blanks or the line's end, the help."""
    listed = text.partition("\noptions:\n")[2].partition("\n\n")[0]
    return {option for line in re.findall(r"(?m)^  (-.*?)(?:  .*)?$", listed) for option in OPTION.findall(line)}


def choices_in_help(text: str) -> set[str]:
    return {choice for group in re.findall(r"\{([^}]*)\}", text) for choice in group.split(",")}


@cache
def sections(page: Path, macro: str) -> dict[str, str]:
    """What stands below each heading of a kind."""
    pieces = re.split(rf"(?m)^\.{macro} (.*)\n", page.read_text())
    return {name: re.split(r"(?m)^\.SH ", text)[0] for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}


def tags(section: str) -> list[str]:
    """The tags of its list, without markup."""
    return [plain(tag) for tag in re.findall(r"(?m)^\.T[PQ]\n(.*)$", section)]


def plain(text: str) -> str:
    text = re.sub(r"^\.[A-Z]+ ", "", text).replace('"', "").replace("\\-", "-")
    return re.sub(r"\\f[A-Z]|\\,", "", text)


def options_in(section: str) -> set[str]:
    return {option for tag in tags(section) for option in OPTION.findall(tag)}


@pytest.mark.parametrize("page", [IMAGEFS, MOUNT], ids=lambda page: page.name)
def test_pages_are_clean(page: Path) -> None:
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", page],
        env={**os.environ, "LC_ALL": "C.UTF-8", "MANROFFSEQ": "", "MANWIDTH": "80"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_all_commands_are_described() -> None:
    assert list(sections(IMAGEFS, "SS")) == list(COMMANDS)
    synopsis = re.findall(r"(?m)^\.SY imagefs\n\.B (\w+)$", IMAGEFS.read_text())
    assert synopsis == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_commands(command: str) -> None:
    text = help_of("imagefs.cli", command)
    section = sections(IMAGEFS, "SS")[command]
    assert options_in(section) == options_in_help(text) - COMMON
    words = set(re.findall(r"[\w-]+", plain(section)))
    assert choices_in_help(text) <= words
    synopsis = next(part for part in IMAGEFS.read_text().split(".SY imagefs\n") if part.startswith(f".B {command}\n"))
    named = set(OPTION.findall(plain(synopsis.partition(".YS")[0])))
    assert {option for option in options_in(section) if option.startswith("--")} - {"--quiet"} <= named


def test_options_of_every_command() -> None:
    assert options_in(sections(IMAGEFS, "SH")["OPTIONS"]) == options_in_help(help_of("imagefs.cli"))
    for command in COMMANDS:
        assert options_in_help(help_of("imagefs.cli", command)) >= COMMON


def test_flags_of_mount() -> None:
    flags = options_in(sections(MOUNT, "SH")["OPTIONS"])
    assert flags == options_in_help(help_of("imagefs.cli.mount")) | FROM_MOUNT


def mount_options_in_help() -> set[str]:
    listed = help_of("imagefs.cli.mount").partition("options for -o")[2].partition("\n\n")[0]
    names = re.findall(r"(?m)^  (\w+(?:=\w+)?(?:, \w+=\w+)*)  ", listed)
    return {option.partition("=")[0] for line in names for option in line.split(", ")}


def test_mount_options() -> None:
    described = tags(sections(MOUNT, "SH")["MOUNT OPTIONS"])
    assert {tag.partition("=")[0] for tag in described} == mount_options_in_help()


def test_mount_options_are_understood_as_described() -> None:
    for tag in tags(sections(MOUNT, "SH")["MOUNT OPTIONS"]):
        name, given, values = re.sub(" ", "", tag).partition("=")
        for value in values.split("|"):
            sample = {"N": "7", "DIR": "/tmp", "SECONDS": "2.5", "KIB": "256", "FILE": "/dev/null"}.get(value, value)
            assert parse_options(f"{name}={sample}" if given else name)
        if given:
            with pytest.raises(UsageError, match=name):
                parse_options(name)


def test_exit_statuses_of_mount() -> None:
    listed = re.search(r"exit status: (.*)", help_of("imagefs.cli.mount"))
    assert listed is not None
    assert tags(sections(MOUNT, "SH")["EXIT STATUS"]) == re.findall(r"\d+", listed[1])
