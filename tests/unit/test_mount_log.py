"""What of pyfuse3's words goes into a mount's log."""

from __future__ import annotations

import logging

import pytest

from imagefs.mount.daemon import _someone_waited


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("fuse_release(): fuse_reply_* failed with %s", "No such file or directory", False),
        ("fuse_release(): fuse_reply_* failed with %s", "Input/output error", True),
        ("fuse_read(): fuse_reply_* failed with %s", "No such file or directory", True),
    ],
)
def test_only_a_release_that_the_kernel_has_forgotten_is_no_error(text: str, error: str, told: bool) -> None:
    record = logging.LogRecord("pyfuse3", logging.ERROR, "handlers.pxi", 1, text, (error,), None)
    assert _someone_waited(record) is told
