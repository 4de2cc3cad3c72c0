"""The guest's own structure, found in its memory alike for all formats: they give the vCPUs, this gives page kinds."""

from __future__ import annotations

from dataclasses import replace

from imagefs.image.capture import Capture
from imagefs.image.pagetables import walk


def with_structure(capture: Capture) -> Capture:
    """The capture with its page tables, walked from the vCPUs' CR3 unless the source itself said which they are."""
    if capture.essential or not capture.vcpus:
        return capture
    return replace(capture, essential=walk(capture.memory, capture.geometry, capture.vcpus))
