"""What to say of images that QEMU cannot resume: which program can, and how."""

from __future__ import annotations

from pathlib import Path

_HOW = {
    "firecracker": "load it with Firecracker: snapshot_path {0}/state, mem_backend of type File {0}/memory, or of"
    " type Uffd with imagefs restore {0} --door pager --socket PATH",
    "cloud-hypervisor": "cloud-hypervisor --restore source_url=file://{0}/native",
    "criu": "these are processes, for criu restore -D {0}/native (which is untried)",
    "xen": "Xen resumes what xl saved: xl restore {0}/native",
    "vmware": "it can be inspected, not resumed",
}


def how_to_resume(vmm: object, mountpoint: Path) -> str:
    """One line for the user. ``vmm`` is what the image says, and images come from elsewhere."""
    if isinstance(vmm, str) and vmm in _HOW:
        return f"{mountpoint}: the image is not of QEMU: {_HOW[vmm].format(mountpoint)}"
    return f"{mountpoint}: the image is of the VMM {vmm!r}, which nothing here can resume"
