"""VMware: ``NAME.vmem``, the guest's memory, and beside it ``NAME.vmss`` (suspended) or ``NAME.vmsn`` (snapshot).

The .vmem is flat; where its parts are in guest-physical memory the state file says, see
:mod:`imagefs.formats.vmware_state`. Either of the two may be given, the other one is found by its name or with
``--memory``. A .vmem alone is taken for memory from address zero, and a note says so: above some 3 GiB that is wrong.
It can be inspected only; what VMware does with the rest of the state is not documented.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Input, Workspace
from imagefs.formats.directory import SeveralFiles, file_names
from imagefs.formats.pieces import PieceMemory, page_runs
from imagefs.formats.spool import FileSource, Spool
from imagefs.formats.vmware_state import StateRegion, read_regions, state_version
from imagefs.image.capture import ByteSource, BytesSource, Capture
from imagefs.image.geometry import PAGE_SIZE, Geometry, Region

MEMORY_SUFFIX = ".vmem"
STATE_SUFFIXES = (".vmss", ".vmsn")


class Vmware:
    """The format ``vmware``."""

    name = "vmware"

    def matches(self, source: Input) -> bool:
        if state_version(source.head) is not None:
            return True
        # Only what no other format claims: a .vmem begins with whatever is at the guest's address zero.
        return source.path is not None and source.directory is None and source.path.suffix == MEMORY_SUFFIX

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        if source.directory is not None:
            raise UsageError(f"{source.name} is a directory: give the .vmss, .vmsn or .vmem in it")
        whole = source.whole(workspace)
        if state_version(source.head) is None:
            if memory_files:
                raise UsageError(f"--memory {memory_files[0]}: {source.name} is the memory already")
            return self._of_memory(source, whole, workspace)
        memory_path = _memory_of(source, memory_files)
        state_path = source.path or Path("state.vmss")
        return self._capture(state_path, whole, memory_path, workspace.file(memory_path), workspace)

    def _of_memory(self, source: Input, memory: FileSource | Spool, workspace: Workspace) -> Capture:
        path = source.path or Path("memory.vmem")
        found = [path.with_suffix(suffix) for suffix in STATE_SUFFIXES if path.with_suffix(suffix).is_file()]
        if source.path is not None and len(found) > 1:
            raise UsageError(f"{path} may belong to {found[0].name} or to {found[1].name}: give that one instead")
        if source.path is not None and found:
            return self._capture(found[0], workspace.file(found[0]), path, memory, workspace)
        return self._capture(None, BytesSource(b""), path, memory, workspace)

    def _capture(
        self, state_path: Path | None, state: ByteSource, memory_path: Path, file: ByteSource, workspace: Workspace
    ) -> Capture:
        if not file.size:
            raise UnsupportedInputError(f"{memory_path} is empty", field="memory", offset=0)
        notes, regions = [], []
        version = None
        if state_path is not None:
            head = bytes(state.read_at(0, 16))
            version = state_version(head)
            if version is None:
                raise UnsupportedInputError(
                    f"{state_path} begins with {head[:4].hex()}, no .vmss or .vmsn does", field="magic", offset=0
                )
            regions = read_regions(state, version)
            _check_regions(regions, file.size, memory_path)
        if not regions:
            notes.append("where the memory is in the guest is not known: addresses count from zero")
            regions = [StateRegion(0, 0, -(-file.size // PAGE_SIZE), 0)]
        memory, placed, spans = PieceMemory(), [], []
        for number, region in enumerate(sorted(regions, key=lambda region: region.file_page)):
            offset, place, size = region.file_page * PAGE_SIZE, memory.size, region.pages * PAGE_SIZE
            length = min(size, file.size - offset)
            memory.add(place, file, offset, length)
            memory.pad(place + size)
            spans.append((offset, length, place))
            placed.append(Region(f"ram-{number}", region.guest_page * PAGE_SIZE, size, place))
        several = SeveralFiles(workspace)
        paths = [memory_path] if state_path is None else [state_path, memory_path]
        names = file_names(paths)
        if state_path is not None:
            several.add(names[0], state)
        several.add(names[-1], file, page_runs(spans))
        native, files = several.finish()
        return Capture(
            source_format=self.name,
            source_version="" if version is None else str(version),
            geometry=Geometry(tuple(placed)),
            memory=memory,
            native=native,
            native_files=files if state_path is not None else (),
            state=state,
            restore={"vmm": "vmware", **({"notes": notes} if notes else {})},
        )


FORMAT = Vmware()


def _memory_of(source: Input, memory_files: Sequence[Path]) -> Path:
    if len(memory_files) > 1:
        raise UsageError(f"--memory {memory_files[1]}: a VMware guest has one .vmem")
    if memory_files:
        return memory_files[0]
    if source.path is not None:
        beside = source.path.with_suffix(MEMORY_SUFFIX)
        if beside.is_file():
            return beside
        raise UsageError(f"{source.name}: there is no {beside.name} beside it; say where the memory is with --memory")
    raise UsageError(f"{source.name} is the state only; say where the .vmem is with --memory")


def _check_regions(regions: Sequence[StateRegion], size: int, memory_path: Path) -> None:
    """They lie in the file, and overlap neither there nor in the guest."""
    end = 0
    for region in sorted(regions, key=lambda region: region.file_page):
        if region.file_page < end:
            raise UnsupportedInputError(
                f"page {region.file_page:#x} of the memory file is in two regions",
                field="regionPageNum",
                offset=region.offset,
            )
        end = region.file_page + region.pages
        if end * PAGE_SIZE > size:
            raise UnsupportedInputError(
                f"the region ends at byte {end * PAGE_SIZE:,} of {memory_path}, which has {size:,}",
                field="regionSize",
                offset=region.offset,
            )
    end = 0
    for region in sorted(regions, key=lambda region: region.guest_page):
        if region.guest_page < end:
            raise UnsupportedInputError(
                f"guest page {region.guest_page:#x} is in two regions", field="regionPPN", offset=region.offset
            )
        end = region.guest_page + region.pages
