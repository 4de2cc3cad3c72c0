"""Which imagefs this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_text() -> str:
    """The version for people; a checkout that was never installed has none."""
    try:
        return version("imagefs")
    except PackageNotFoundError:
        return "(not installed)"
