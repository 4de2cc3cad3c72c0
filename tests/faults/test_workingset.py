"""Working sets of real mounts, over nginx: recorded, published, streamed, interrupted, damaged, without a harm done."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.nginx import Nginx

from imagefs.cli import main
from tests.faults.images import RealImage, check_same, memory_of, pack_requests, requests_to, split_raw
from tests.faults.mounts import Mounter, RealMount
from tests.mount.conftest import wait_until

TOUCHED = [33 * 16 + 5, 2 * 16 + 1, 2 * 16 + 9, 17 * 16 + 3, 50 * 16 + 13]
"""Pages that are not zero, in the order in which a guest would touch them."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> RealImage:
    """16 MiB: the whole index would not be needed for a few pages."""
    directory = tmp_path_factory.mktemp("pristine")
    return split_raw(directory, directory / "store", "vm1", memory_of(256, 7, (range(60, 64),)))


@pytest.fixture
def image(pristine: RealImage, tmp_path: Path) -> RealImage:
    shutil.copytree(pristine.store, tmp_path / "store")
    return RealImage(tmp_path / "store", pristine.name, pristine.native, pristine.memory)


@pytest.fixture
def server(image: RealImage) -> Iterator[Nginx]:
    with Nginx(image.store) as nginx:
        yield nginx


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def imagefs(*arguments: object) -> Done:
    """The command, in this process: a new one takes half a second to begin."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Done(status, out.getvalue(), err.getvalue())


def touch(mounted: RealMount, image: RealImage, pages: Iterable[int]) -> None:
    for page in pages:
        check_same(mounted.read_page(page), image.page(page), "page", page)


def many(image: RealImage) -> list[int]:
    """Some 2 MiB, as a guest would touch them: not one after the other."""
    return [page for page in random.Random(5).sample(range(image.pages), 600) if any(image.page(page))]


def record(image: RealImage, mount: Mounter, source: object, pages: Iterable[int], *arguments: object) -> str:
    """Touch pages in a mount and publish that; what the command said."""
    mounted = mount(str(source), f"prefetch=none,cache={image.store.parent}/recording")
    touch(mounted, image, pages)
    done = imagefs("trace", "save", mounted.path, *arguments)
    mounted.unmount()
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def published(image: RealImage) -> list[int]:
    done = imagefs("trace", "show", image.path, "--pages")
    assert (done.returncode, done.stderr) == (0, "")
    return [int(line.split()[0]) for line in done.stdout.splitlines()]


def set_file(image: RealImage) -> Path:
    (found,) = (image.store / "working-sets").iterdir()
    return found


def wait_until_set_is_here(mounted: RealMount) -> dict[str, object]:
    wait_until(
        lambda: mounted.status()["working_set"]["state"] not in ("waiting", "streaming"), "the working set has come"
    )
    found: dict[str, object] = mounted.status()["working_set"]
    return found


def test_what_one_host_recorded_is_on_the_next_before_it_is_read(
    image: RealImage, server: Nginx, mount: Mounter
) -> None:
    said = record(image, mount, f"{server.url}/vm1", TOUCHED, image.path)
    assert said.startswith(f"{image.path}: working set of {len(TOUCHED)} pages, ")
    assert published(image) == TOUCHED
    assert (set_file(image).stat().st_mode & 0o077) == (image.path.stat().st_mode & 0o077)

    before = pack_requests(requests_to(server), [image])
    mounted = mount(f"{server.url}/vm1", "prefetch=ws")
    found = wait_until_set_is_here(mounted)
    assert (found["state"], found["pages"], found["bytes"]) == ("complete", 5, set_file(image).stat().st_size)
    assert set(TOUCHED) <= set(mounted.present())
    touch(mounted, image, TOUCHED)
    assert pack_requests(requests_to(server), [image]) == before
    asked = [request for request in server.requests() if request.path.startswith("/working-sets/")]
    assert [request.status for request in asked] == [404, 200] or [request.status for request in asked] == [200]
    lines = mounted.run("head", "-n", "200", ".imagefs/trace").splitlines()
    assert [int(line.split()[1]) for line in lines] == TOUCHED


def test_a_store_on_a_server_has_to_be_named_as_a_directory(image: RealImage, server: Nginx, mount: Mounter) -> None:
    mounted = mount(f"{server.url}/vm1", "prefetch=none")
    touch(mounted, image, TOUCHED)
    for arguments in ([], [f"{server.url}/vm1"]):
        done = imagefs("trace", "save", mounted.path, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{server.url}/vm1 is on a server, which cannot be written to; name the directory" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (image.store / "working-sets").exists()


def test_a_set_goes_to_its_own_image_only(image: RealImage, mount: Mounter, tmp_path: Path) -> None:
    other = split_raw(tmp_path, image.store, "vm2", memory_of(64, 3))
    mounted = mount(image.path, "prefetch=none")
    done = imagefs("trace", "save", mounted.path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nothing has been recorded" in done.stderr
    touch(mounted, image, TOUCHED)
    done = imagefs("trace", "save", mounted.path, other.path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a working set is of one image only" in done.stderr
    done = imagefs("trace", "save", tmp_path)
    assert (done.returncode, done.stderr) == (1, f"imagefs trace: {tmp_path}: not an imagefs mount\n")
    assert not (image.store / "working-sets").exists()
    # Without a place it goes to where the mount's image is from.
    done = imagefs("trace", "save", mounted.path, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert published(image) == TOUCHED


def test_recordings_add_up_and_can_be_forgotten(image: RealImage, mount: Mounter) -> None:
    record(image, mount, image.path, TOUCHED[:2])
    record(image, mount, image.path, [TOUCHED[4], TOUCHED[1]])
    assert set(published(image)) == {TOUCHED[0], TOUCHED[1], TOUCHED[4]}
    assert published(image)[0] == TOUCHED[1], "it was in both"
    record(image, mount, image.path, TOUCHED[2:3], "--new")
    assert published(image) == TOUCHED[2:3]
    assert imagefs("trace", "remove", image.path).returncode == 0
    done = imagefs("trace", "show", image.path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no working set is published" in done.stderr


def test_who_reads_everything_leaves_no_set(image: RealImage, mount: Mounter) -> None:
    mounted = mount(image.path, "prefetch=none")
    touch(mounted, image, TOUCHED)
    mounted.run("sha256sum", "memory")
    assert imagefs("trace", "save", mounted.path).returncode == 0
    # Touches in the reader's way may be taken for its own, and the other way round.
    found = set(published(image))
    assert len(found & set(TOUCHED)) >= len(TOUCHED) - 2
    assert len(found - set(TOUCHED)) < 64


def test_info_and_verify_know_the_set(image: RealImage, mount: Mounter) -> None:
    assert "working set:  none published" in imagefs("info", image.path).stdout
    record(image, mount, image.path, TOUCHED)
    assert "working set:  5 pages, " in imagefs("info", image.path).stdout
    facts = json.loads(imagefs("info", "--json", image.path).stdout)
    assert facts["working_set"] == {"pages": 5, "bytes": set_file(image).stat().st_size}
    assert imagefs("verify", "-q", image.path).returncode == 0
    damage(set_file(image))
    done = imagefs("verify", "-q", image.path)
    assert done.returncode == 1
    assert "working set: " in done.stderr
    assert imagefs("trace", "show", image.path).returncode == 1
    set_file(image).write_bytes(b"nonsense")
    assert "working set:  damaged: " in imagefs("info", image.path).stdout


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", ["damaged", "cut", "of another image"])
def test_a_set_that_is_wrong_does_no_harm(
    image: RealImage, server: Nginx, mount: Mounter, tmp_path: Path, harm: str
) -> None:
    record(image, mount, image.path, TOUCHED)
    if harm == "damaged":
        damage(set_file(image))
    elif harm == "cut":
        os.truncate(set_file(image), set_file(image).stat().st_size - 1)
    else:
        other = split_raw(tmp_path, tmp_path / "other", "vm1", memory_of(64, 3))
        record(other, mount, other.path, [1, 2, 3])
        shutil.copy(set_file(other), set_file(image))
    warning = "working set: .*the rest of the working set is ignored"
    mounted = mount(f"{server.url}/vm1", "prefetch=ws", expected=[warning])
    assert wait_until_set_is_here(mounted)["state"] == "given up"
    mounted.wait_until_log_says(warning)
    touch(mounted, image, [*TOUCHED, *range(100, 120)])


def test_a_link_that_breaks_in_the_middle(image: RealImage, server: Nginx, mount: Mounter) -> None:
    record(image, mount, image.path, many(image))
    size = set_file(image).stat().st_size
    link = mount.link(server.address, mbit=20, rtt_ms=5)
    mounted = mount(f"{link.url}/vm1", "prefetch=ws", expected=["trying again until", "answers again"])
    wait_until(lambda: link.counters().bytes_down > size // 4, "a part of it has come")
    link.cut("reset")
    wait_until(lambda: mounted.status()["working_set"]["interruptions"], "the stream has broken off")
    link.mend()
    # Meanwhile, and in whatever order.
    touch(mounted, image, TOUCHED)
    found = wait_until_set_is_here(mounted)
    assert (found["state"], found["bytes_received"]) == ("complete", size)
    assert link.counters().bytes_down < 1.3 * size


def test_a_touch_overtakes_the_stream(image: RealImage, server: Nginx, mount: Mounter) -> None:
    pages = many(image)
    record(image, mount, image.path, pages)
    link = mount.link(server.address, mbit=4, rtt_ms=5)
    mounted = mount(f"{link.url}/vm1", "prefetch=ws")
    wait_until(lambda: mounted.status()["working_set"]["state"] == "streaming", "the set is on its way")
    touch(mounted, image, pages[-1:])
    status = mounted.status()
    assert status["working_set"]["state"] == "streaming"
    assert status["fetch"]["requests"] - status["fetch"]["background_requests"] == 1


def test_a_recording_stays_on_the_host(image: RealImage, server: Nginx, mount: Mounter, tmp_path: Path) -> None:
    first = mount(f"{server.url}/vm1", "prefetch=none")
    touch(first, image, TOUCHED)
    first.unmount()
    # The pages are lost, the recording is not.
    for path in (tmp_path / "cache").rglob("p*"):
        path.unlink()
    mounted = mount(f"{server.url}/vm1", "prefetch=ws")
    wait_until(lambda: set(TOUCHED) <= set(mounted.present()), "what was recorded is here again")
    assert mounted.status()["working_set"]["local_pages"] == len(TOUCHED)
    assert not set(range(200 * 16, 210 * 16)) & {page for page in mounted.present() if any(image.page(page))}


def test_no_set_is_asked_for_where_nothing_is_prefetched(image: RealImage, server: Nginx, mount: Mounter) -> None:
    record(image, mount, image.path, TOUCHED)
    mount(f"{server.url}/vm1", "prefetch=none")
    assert not [request for request in server.requests() if request.path.startswith("/working-sets/")]
