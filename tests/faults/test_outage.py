"""Servers that stop and come back, links that are cut and mended: a hard mount waits, and then has the right bytes."""

from __future__ import annotations

import errno
import os
import random
import time
from pathlib import Path

import pytest
from support.link import Link
from support.nginx import Nginx

from tests.faults.images import RealImage, check_same, sha256
from tests.faults.mounts import Mounter
from tests.mount.conftest import wait_until

OUTAGE = (r"trying again until it answers", r"answers again")


def half_way(link: Link, image: RealImage) -> None:
    """Wait until about half of the image has come over a link."""
    half = sum(chunk.place.length for chunk in image.chunks.values()) // 2
    wait_until(lambda: link.counters().bytes_down > half, "half of it has come")


@pytest.mark.parametrize("options", ["prefetch=none", "prefetch=all", "nocache"])
def test_server_killed_in_the_middle_comes_back(image: RealImage, server: Nginx, mount: Mounter, options: str) -> None:
    """The transfer breaks off, and so does whatever is asked for until the server is there again."""
    link = mount.link(server.address, mbit=40, rtt_ms=5)
    mounted = mount(f"{link.url}/vm1", options, expected=OUTAGE)
    reader = mounted.start_reader(image, range(image.pages), threads=3)
    half_way(link, image)
    server.kill()
    mounted.wait_until_log_says("trying again")
    wait_until(lambda: mounted.waiting() == 3, "all readers wait")
    assert reader.process.poll() is None
    server.start()
    assert reader.result() == {"right": image.pages, "wrong": [], "errors": {}}
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")
    assert mounted.status()["fetch"]["store_answers"]
    assert mounted.status()["fetch"]["outages"] >= 1


def test_soft_mount_gives_up_and_recovers(image: RealImage, server: Nginx, mount: Mounter) -> None:
    mounted = mount(f"{server.url}/vm1", "prefetch=none,soft,timeo=1", expected=[*OUTAGE, "not here after 1"])
    check_same(mounted.read_page(1), image.page(1), "before", 1)
    server.kill()
    begun = time.monotonic()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        mounted.read_page(100)
    # The bound tells a soft mount from a hard one, no more.
    assert 0.9 < time.monotonic() - begun < 30
    assert mounted.start_reader(image, [200, 300], threads=2).result()["errors"] == {str(errno.EIO): 2}
    # What is here is here.
    check_same(mounted.read_page(2), image.page(2), "without the server", 2)
    server.start()

    wait_until(lambda: not mounted.start_reader(image, [100]).result()["errors"], "it works again")
    check_same(mounted.read_page(100), image.page(100), "after", 100)
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")


def test_soft_mount_behind_a_cut_link(image: RealImage, server: Nginx, mount: Mounter) -> None:
    """Nobody refuses, nobody answers: the reader's own clock ends its wait, and pages that come later are kept."""
    link = mount.link(server.address, mbit=100, rtt_ms=2)
    mounted = mount(f"{link.url}/vm1", "prefetch=none,soft,timeo=0.5", expected=[*OUTAGE, "not here after 0.5"])
    link.cut("hang")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        mounted.read_page(100)
    link.mend()
    wait_until(lambda: mounted.xattr(100, "state") == "present", "the page comes after all")
    check_same(mounted.read_page(100), image.page(100), "page", 100)


def test_sha256sum_over_a_link_that_is_reset(image: RealImage, server: Nginx, mount: Mounter) -> None:
    link = mount.link(server.address, mbit=40, rtt_ms=5)
    mounted = mount(f"{link.url}/vm1", expected=OUTAGE)
    reader = mounted.start("sha256sum", "memory")
    half_way(link, image)
    link.cut("reset")
    mounted.wait_until_log_says("trying again")
    assert reader.process.poll() is None
    link.mend()
    assert reader.process.communicate(timeout=60)[0].split()[0] == sha256(image.memory)


def test_link_down_for_longer_than_any_timeout(image: RealImage, server: Nginx, mount: Mounter, tmp_path: Path) -> None:
    """Requests under way go unanswered until they are given up, and those that are made anew are, too."""
    link = mount.link(server.address, mbit=8, rtt_ms=5)
    # The sweep last: a busy machine takes so long to mount that it would be done.
    lazy, small, swept = (
        mount(f"{link.url}/vm1", f"{options},cache={tmp_path}/cache{number}", expected=OUTAGE)
        for number, options in enumerate(["prefetch=none", "prefetch=none,connections=1", "prefetch=all"])
    )
    digests = [mounted.start("sha256sum", "memory") for mounted in (swept, lazy, small)]
    half_way(link, image)
    link.cut("hang")
    for mounted in (swept, lazy, small):
        mounted.wait_until_log_says("no answer in time; trying again")
    assert [digest.process.poll() for digest in digests] == [None] * 3
    link.set(mbit=200)
    link.mend()
    for digest in digests:
        assert digest.process.communicate(timeout=60)[0].split()[0] == sha256(image.memory)
    swept.wait_until_complete()


def test_many_readers_over_a_slow_link(image: RealImage, server: Nginx, mount: Mounter, rng: random.Random) -> None:
    """64 at once, each at random places, and all in each other's way."""
    link = mount.link(server.address, mbit=16, rtt_ms=40)
    mounted = mount(f"{link.url}/vm1")
    pages = [rng.randrange(image.pages) for _ in range(64 * 20)]
    reader = mounted.start_reader(image, pages, threads=64)
    result = reader.result()
    assert result == {"right": len(pages), "wrong": [], "errors": {}}
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")
