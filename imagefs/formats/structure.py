"""The guest's own structure, found in its memory alike for all formats: they give the vCPUs, this gives page kinds."""

from __future__ import annotations

from dataclasses import replace

from imagefs.image.capture import Capture
from imagefs.image.linux import kernel_text
from imagefs.image.pagetables import walk


def with_structure(capture: Capture) -> Capture:
    """The capture with its page tables and kernel text, unless the source itself said which pages are page tables."""
    if capture.essential or not capture.vcpus:
        return capture
    tables = walk(capture.memory, capture.geometry, capture.vcpus)
    text = kernel_text(capture.memory, capture.geometry, capture.vcpus)
    return replace(capture, essential=(*tables, *text))
