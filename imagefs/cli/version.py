"""Which imagefs this is."""

from __future__ import annotations

import argparse
import sys
from typing import Any


class ShowVersion(argparse.Action):
    """``--version``. The version is looked up only for who asks: that takes 40 ms."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser._print_message(f"{parser.prog} {version_text()}\n", sys.stdout)
        parser.exit()


def version_text() -> str:
    """The version for people; a checkout that was never installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("imagefs")
    except PackageNotFoundError:
        return "(not installed)"
