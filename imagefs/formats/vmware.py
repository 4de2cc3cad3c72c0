"""VMware: ``NAME.vmem``, the guest's memory, and beside it ``NAME.vmss`` (suspended) or ``NAME.vmsn`` (snapshot).

The .vmem is flat; where its parts are in guest-physical memory the state file says, see
:mod:`imagefs.formats.vmware_state`. Either of the two may be given, the other one is found by its name or with
``--memory``. A state file may also have the memory in itself. A .vmem alone is taken for memory from address zero,
and a note says so: above some 3 GiB that is wrong. It can be inspected only; what VMware does with the rest of the
state is not documented.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Input, Workspace
from imagefs.formats.directory import SeveralFiles, file_names
from imagefs.formats.pieces import PieceMemory, page_runs
from imagefs.formats.spool import FileSource, Spool
from imagefs.formats.vmware_state import State, StateRegion, read_state, state_version
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
        # It begins with whatever is at the guest's address zero: its name is all that there is.
        return source.path is not None and source.directory is None and source.path.suffix == MEMORY_SUFFIX

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        if source.directory is not None:
            raise UsageError(f"{source.name} is a directory: give the .vmss, .vmsn or .vmem in it")
        if not self.matches(source):
            raise UnsupportedInputError(
                f"{source.name} begins with {source.head[:4].hex()}, as no .vmss or .vmsn does, nor is its name that of"
                " a .vmem; flat memory is --format raw",
                field="magic",
                offset=0,
            )
        whole = source.whole(workspace)
        if state_version(source.head) is None:
            if memory_files:
                raise UsageError(f"--memory {memory_files[0]}: {source.name} is the memory already")
            return self._of_memory(source, whole, workspace)
        version = state_version(source.head)
        assert version is not None
        state_path = source.path or Path("state.vmss")
        state = read_state(whole, version)
        if state.memory is not None and not memory_files:
            return self._capture(state_path, whole, state, state_path, whole, workspace)
        memory_path = _memory_of(source, memory_files)
        return self._capture(state_path, whole, state, memory_path, workspace.file(memory_path), workspace)

    def _of_memory(self, source: Input, memory: FileSource | Spool, workspace: Workspace) -> Capture:
        path = source.path
        assert path is not None
        found = [path.with_suffix(suffix) for suffix in STATE_SUFFIXES if path.with_suffix(suffix).is_file()]
        if len(found) > 1:
            raise UsageError(f"{path} may belong to {found[0].name} or to {found[1].name}: give that one instead")
        if found:
            file = workspace.file(found[0])
            head = bytes(file.read_at(0, 16))
            version = state_version(head)
            if version is None:
                raise UnsupportedInputError(
                    f"{found[0]} begins with {head[:4].hex()}, no .vmss or .vmsn does", field="magic", offset=0
                )
            return self._capture(found[0], file, read_state(file, version), path, memory, workspace)
        return self._capture(None, BytesSource(b""), State([], None, ()), path, memory, workspace)

    def _capture(
        self,
        state_path: Path | None,
        state_file: ByteSource,
        state: State,
        memory_path: Path,
        file: ByteSource,
        workspace: Workspace,
    ) -> Capture:
        """``memory_path`` is ``state_path`` where the memory is in the state file."""
        base, size = (0, file.size) if memory_path != state_path else state.memory or (0, 0)
        if not size:
            raise UnsupportedInputError(f"the memory in {memory_path} is empty", field="memory", offset=base)
        _check_regions(state.regions, size, memory_path)
        regions, notes = state.regions, []
        if not regions:
            regions = [StateRegion(0, 0, -(-size // PAGE_SIZE), 0)]
            if state_path is None:
                notes.append("where the memory is in the guest is not known: addresses count from zero")
        memory, placed, spans = PieceMemory(), [], []
        for number, region in enumerate(sorted(regions, key=lambda region: region.file_page)):
            offset, place, wanted = region.file_page * PAGE_SIZE, memory.size, region.pages * PAGE_SIZE
            length = min(wanted, size - offset)
            memory.add(place, file, base + offset, length)
            memory.pad(place + wanted)
            spans.append((base + offset, length, place))
            placed.append(Region(f"ram-{number}", region.guest_page * PAGE_SIZE, wanted, place))
        several = SeveralFiles(workspace)
        paths = [state_path, memory_path] if state_path not in (None, memory_path) else [memory_path]
        names = file_names([path for path in paths if path is not None])
        if len(names) > 1:
            several.add(names[0], state_file)
        several.add(names[-1], file, page_runs(spans))
        native, files = several.finish()
        version = state_version(bytes(state_file.read_at(0, 4)))
        return Capture(
            source_format=self.name,
            source_version="" if version is None else str(version),
            geometry=Geometry(tuple(placed)),
            memory=memory,
            native=native,
            native_files=files if len(files) > 1 else (),
            state=state_file if memory_path != state_path else BytesSource(b""),
            vcpus=state.vcpus,
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
