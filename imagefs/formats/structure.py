"""The guest's own structure, found in its memory alike for all formats: they give the vCPUs, this gives page kinds."""

from __future__ import annotations

from dataclasses import replace

from imagefs.image.capture import Capture
from imagefs.image.likely import likely_pages
from imagefs.image.linux import kernel_text
from imagefs.image.pagetables import walk


def with_structure(capture: Capture) -> Capture:
    """The capture with its page tables, its kernel text and the pages that it will probably touch first, unless the
    source itself said which pages are page tables (those of Xen PV guests do not have guest-physical addresses)."""
    if capture.essential or not capture.vcpus:
        return capture
    tables = walk(capture.memory, capture.geometry, capture.vcpus)
    text = kernel_text(capture.memory, capture.geometry, capture.vcpus)
    likely = likely_pages(capture.memory, capture.geometry, capture.vcpus, text)
    return replace(capture, essential=(*tables, *text), likely=likely)
