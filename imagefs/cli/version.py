"""Which imagefs this is."""

from __future__ import annotations


def version_text() -> str:
    """The version for people; a checkout that was never installed has none."""
    # Here, because it costs every command 40 ms.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("imagefs")
    except PackageNotFoundError:
        return "(not installed)"
