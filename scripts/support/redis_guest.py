"""A guest with a real service: Redis out of Debian's packages, on a virtio network card, its data in memory only.

The guest is :mod:`support.guest`'s kernel with an initramfs of busybox, redis-server and the libraries that it is
linked with. It has the address that QEMU's user network gives (10.0.2.15), so ``network()`` forwards a port to it.
"""

from __future__ import annotations

import re
from pathlib import Path

from support.commands import run
from support.debian import GuestError, dependencies, unpack
from support.guest import Guest, cached_initramfs, kernel_package, locked_cache
from support.initramfs import Program, build_archive, module_order

SERVER = "/usr/bin/redis-server"
PORT = 6379
READY = "Ready to accept connections"
"""What Redis says on the serial line when it can be used."""
PACKAGES = r"redis-tools|lib.*"
"""Of what redis-server depends on: the package with the program, and libraries."""
MODULES = ("virtio_pci", "virtio_net")

_INIT = f"""
/bin/busybox ip link set lo up
/bin/busybox ip link set eth0 up
/bin/busybox ip addr add 10.0.2.15/24 dev eth0
exec {SERVER} --bind 0.0.0.0 --port {PORT} --protected-mode no --save "" --appendonly no --dir /
"""


def build_redis_guest() -> Guest:
    """Out of the cache, built (and its packages downloaded) if it is not there; as ``build_guest``."""
    with locked_cache() as cache:
        kernel_tree, kernel = kernel_package(cache)
        packages = _redis_packages(cache)
        modules = module_order(kernel_tree, MODULES)

        def build(work: Path) -> bytes:
            return build_archive(_INIT, _programs(packages), modules)

        names = [kernel_tree.name, packages.name, *(path.name for path in modules)]
        return Guest(kernel, cached_initramfs(cache, [Path(__file__)], names, build))


def network(port: int) -> list[str]:
    """Arguments of QEMU: the guest's network card, and port ``port`` of this host's loopback that leads to Redis."""
    forward = f"hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:{PORT}"
    return ["-netdev", f"user,id=net,{forward}", "-device", "virtio-net-pci,netdev=net,romfile="]


def _redis_packages(cache: Path) -> Path:
    """Redis and its libraries, unpacked into one directory; its name has the version."""
    ready = sorted(cache.glob("redis-server_*"), key=lambda path: path.stat().st_mtime)
    if ready:
        return ready[-1]
    names = ["redis-server", *dependencies("redis-server", PACKAGES)]
    version = re.search(r"^Version: (\S+)$", run("apt-cache", "show", "--no-all-versions", "redis-server"), re.M)
    if version is None:
        raise GuestError("apt says no version of redis-server")
    target = cache / f"redis-server_{version[1].replace(':', '_')}"
    unpack(names, target)
    return target


def _programs(tree: Path) -> list[Program]:
    """The server, its dynamic loader, and the libraries that the loader finds, all in ``tree`` and nowhere else."""
    loaders = list(tree.glob("lib*/**/ld-linux-x86-64.so.2"))
    if not loaders:
        raise GuestError(f"{tree} has no dynamic loader; remove it")
    directories = [tree / "lib/x86_64-linux-gnu", tree / "usr/lib/x86_64-linux-gnu"]
    path = ":".join(map(str, directories))
    server = tree / SERVER.lstrip("/")
    listed = run(str(loaders[0]), "--library-path", path, "--list", str(server))
    found = {}
    for name, where in re.findall(r"^\s*(\S+) => (\S+|not found)", listed, re.MULTILINE):
        if not where.startswith(f"{tree}/"):
            raise GuestError(f"{tree} lacks the library {name} of redis-server ({where}); remove it")
        # The loader itself is named by its path, everything else is looked for by the guest's loader in /lib.
        found[name if name.startswith("/") else f"/lib/{name}"] = Path(where)
    return [Program(SERVER, server.read_bytes()), *(Program(at, path.read_bytes()) for at, path in found.items())]
