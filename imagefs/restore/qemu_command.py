"""Make a QEMU command line resume a mounted image: arguments in, arguments out.

The user's command line is taken as it is, be it the very one with which the guest was first started. What changes:

- ``-machine`` gets the image's machine type, and ``memory-backend=`` with the name of the image's RAM block;
- ``-object memory-backend-file`` of that id is added, over the mount's ``memory``. The backend that held the guest's
  RAM before (of that id, or the one that -machine named) goes, and with it ``-mem-path`` and ``-mem-prealloc``, which
  would read the whole image before the guest runs. What it said of its pages (NUMA policy, merge, dump) stays;
- ``-m`` and ``-smp`` are added where they are missing;
- ``-incoming`` is added.

What cannot match (machine, size of RAM, number of CPUs) is refused. Disks are the user's business: they must be as
they were when the guest was suspended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from imagefs.errors import RestoreError, UsageError
from imagefs.restore.mountpoint import RestoreImage
from imagefs.restore.qemu_anonymous import anonymous_backend, default_monitor
from imagefs.restore.qemu_machine import Machines, choose_machine
from imagefs.restore.qemu_options import (
    Option,
    as_option,
    join_pieces,
    merged,
    object_properties,
    parse_arguments,
    parse_size,
    size_text,
    split_pieces,
    words_of,
)

_MACHINE = ("machine", "M")
_DROPPED = {
    "mem-path": "guest RAM comes from the mount",
    "mem-prealloc": "it would read the whole image before the guest runs",
}
_REFUSED = {
    "incoming": "imagefs restore gives QEMU the state of the image itself",
    "loadvm": "a snapshot and an image cannot both be resumed",
}
_REFUSED_RECEIVING = {
    "daemonize": "imagefs restore stays QEMU's parent while pages are on their way; put it into the background itself",
    "preconfig": "the guest's state is loaded as soon as QEMU has started",
}
_REFUSED_PAGED = {"daemonize": _REFUSED_RECEIVING["daemonize"]}
_KEPT_PROPERTIES = ("merge", "dump", "policy", "reserve", "host-nodes")


class Command(NamedTuple):
    """A command line, and what its user may want to know about how it came about."""

    arguments: tuple[str, ...]
    notes: tuple[str, ...] = ()


def restore_command(
    command: Sequence[str],
    image: RestoreImage,
    incoming: str,
    machines: Callable[[], Machines],
    *,
    is_paged: bool = False,
) -> Command:
    """``command``, program first, changed so that it maps ``image``; ``incoming`` is the value of ``-incoming``.
    ``is_paged``: somebody stays QEMU's parent and brings the pages.

    ``machines`` lists the program's machine types; it is called only if they matter. Raises UsageError for a
    command line that is none, RestoreError where it does not fit the image.
    """
    options = _parse(command)
    _refuse(options, _REFUSED_PAGED if is_paged else {})
    _check_sandbox(options)
    backend = _backend_name(image)
    options, given = _take_backends(options, image, backend)
    memory = {"id": backend, "size": size_text(image.ram_bytes), "mem-path": str(image.memory), "share": "off"}
    # A key may stand there more than once (host-nodes), so pieces, not a mapping.
    properties = _kept(given.value, object_properties(given.value)) if given and given.value else []
    pieces = ["memory-backend-file", *(f"{key}={value}" for key, value in memory.items()), *properties]
    memory_object = as_option("object", join_pieces(pieces))
    return _resuming(command[0], options, image, machines, memory_object, [as_option("incoming", incoming)])


def receiving_command(
    command: Sequence[str], image: RestoreImage, machines: Callable[[], Machines], *, stopped: bool = False
) -> Command:
    """``command`` changed so that it waits for the guest of ``image`` to be sent. Guest RAM stays what it was, but for
    files: userfaultfd knows only anonymous and shared memory. ``stopped``: the guest is not to run. Errors as above.
    """
    options = _parse(command)
    _refuse(options, _REFUSED_RECEIVING)
    backend = _backend_name(image)
    options, given = _take_backends(options, image, backend)
    memory_object = anonymous_backend(given.value if given else None, backend, image.ram_bytes)
    stop = [Option("S", None, ("-S",))] if stopped and all(option.name != "S" for option in options) else []
    added = [*stop, *default_monitor(options), as_option("incoming", "defer")]
    return _resuming(command[0], options, image, machines, memory_object, added)


def _parse(command: Sequence[str]) -> list[Option]:
    if not command:
        raise UsageError("the QEMU command line is missing: imagefs restore MOUNTPOINT -- qemu-system-x86_64 ARGS…")
    options = parse_arguments(command[1:])
    for option in options:
        if option.name in _REFUSED:
            raise RestoreError(f"-{option.name} {option.value}: leave it out, {_REFUSED[option.name]}")
    _check_numa(options)
    return options


def _refuse(options: Iterable[Option], refused: Mapping[str, str]) -> None:
    for option in options:
        if option.name is not None and option.name in refused:
            raise RestoreError(f"-{option.name}: leave it out, {refused[option.name]}")


def _backend_name(image: RestoreImage) -> str:
    return image.ram_block.removeprefix("/objects/")


def _resuming(
    program: str,
    options: Sequence[Option],
    image: RestoreImage,
    machines: Callable[[], Machines],
    memory_object: Option,
    added: Sequence[Option],
) -> Command:
    machine = choose_machine(merged(options, _MACHINE, "type").get("type"), image.machine, machines)
    notes = [f"-{o.name} is left out: {_DROPPED[o.name]}" for o in options if o.name in _DROPPED]
    options = [option for option in options if option.name not in _DROPPED]
    changed = [
        *_with_machine(options, machine, _backend_name(image)),
        *_missing_size(options, image),
        *_missing_cpus(options, image),
        memory_object,
        *added,
    ]
    return Command((program, *words_of(changed)), tuple(notes))


def _check_sandbox(options: Iterable[Option]) -> None:
    if merged(options, ("sandbox",), "enable").get("spawn") == "deny":
        raise RestoreError("-sandbox spawn=deny: QEMU runs a shell to read the image's state; leave spawn out")


def _check_numa(options: Iterable[Option]) -> None:
    nodes = 0
    for option in options:
        if option.name != "numa" or option.value is None:
            continue
        pieces = split_pieces(option.value)
        nodes += pieces[0] in ("node", "type=node")
        if nodes > 1 or any(piece.startswith(("memdev=", "mem=")) for piece in pieces):
            raise RestoreError(f"-numa {option.value}: guests with several NUMA nodes are not supported yet")


def _take_backends(options: Sequence[Option], image: RestoreImage, backend: str) -> tuple[list[Option], Option | None]:
    """The options without the objects that held guest RAM, and the last of these."""
    named = merged(options, _MACHINE, "type").get("memory-backend")
    rest, taken = [], None
    for option in options:
        if option.name != "object" or option.value is None:
            rest.append(option)
            continue
        given = object_properties(option.value)
        name, kind = str(given.get("id")), str(given.get("qom-type"))
        if name not in (backend, named):
            rest.append(option)
            continue
        if not kind.startswith("memory-backend-"):
            raise RestoreError(f"-object {kind},id={name}: the image's RAM needs this id, give the object another one")
        _check_size(f"-object {kind},id={name},size={given.get('size')}", given.get("size"), "b", image)
        taken = option
    return rest, taken


def _kept(value: str, given: Mapping[str, object]) -> list[str]:
    if not value.startswith("{"):
        pieces = split_pieces(value)
        return [piece for piece in pieces if piece.partition("=")[0].partition(".")[0] in _KEPT_PROPERTIES]
    kept = []
    for key in _KEPT_PROPERTIES:
        if key in given:
            values = given[key] if isinstance(given[key], list) else [given[key]]
            assert isinstance(values, list)
            kept += [f"{key}={'on' if v is True else 'off' if v is False else v}" for v in values]
    return kept


def _with_machine(options: Sequence[Option], machine: str, backend: str) -> list[Option]:
    """The options with all -machine and -M joined into one, where the first of them stood."""
    pieces = [machine]
    for option in options:
        if option.name in _MACHINE and option.value is not None:
            given = split_pieces(option.value)
            if given and "=" not in given[0]:
                del given[0]
            pieces += [piece for piece in given if piece.partition("=")[0] not in ("type", "memory-backend", "")]
    joined = as_option("machine", join_pieces([*pieces, f"memory-backend={backend}"]))
    places = [number for number, option in enumerate(options) if option.name in _MACHINE]
    rest = [option for option in options if option.name not in _MACHINE]
    rest.insert(places[0] if places else 0, joined)
    return rest


def _missing_size(options: Sequence[Option], image: RestoreImage) -> list[Option]:
    """``-m`` where the command line has none. QEMU's own default, 128 MiB, is nothing that a user said."""
    text = merged(options, ("m",), "size").get("size")
    if text is None:
        return [as_option("m", {"size": size_text(image.ram_bytes)})]
    _check_size(f"-m {text}", text, "m", image)
    return []


def _check_size(what: str, given: object, unit: str, image: RestoreImage) -> None:
    if given is None:
        return
    size = given if isinstance(given, int) else parse_size(str(given), unit)
    if size is None:
        raise RestoreError(f"{what}: {given!r} is no size")
    if size != image.ram_bytes:
        raise RestoreError(
            f"{what}: that is {size:,} bytes of RAM, the image has {image.ram_bytes:,}: "
            f"give {size_text(image.ram_bytes)}"
        )


def _missing_cpus(options: Sequence[Option], image: RestoreImage) -> list[Option]:
    if image.cpus is None or any(_is_cpu(option) for option in options):
        return []
    given = merged(options, ("smp",), "cpus")
    if not given:
        return [as_option("smp", str(image.cpus))]
    text = given.get("cpus")
    # Without cpus= QEMU multiplies sockets, cores and threads, by rules that changed between its versions.
    if text is not None and text.isdecimal() and int(text) != image.cpus:
        raise RestoreError(f"-smp {text}: the image has {image.cpus} CPUs, give -smp {image.cpus}")
    return []


def _is_cpu(option: Option) -> bool:
    """Whether it plugs in a CPU (``-device qemu64-x86_64-cpu,…``)."""
    return option.name == "device" and option.value is not None and split_pieces(option.value)[0].endswith("-cpu")
