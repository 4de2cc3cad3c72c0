"""Which page of ``memory`` is which guest frame."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.image.geometry import PAGE_SIZE, Geometry, Region
from tests.unit.test_mount_tree import geometries


@given(geometries(), st.data())
def test_pages_and_frames(geometry: Geometry, data: st.DataObject) -> None:
    frames = {
        (region.guest_address + at) // PAGE_SIZE: (region.offset + at) // PAGE_SIZE
        for region in geometry.regions
        for at in range(0, region.size, PAGE_SIZE)
    }
    assert geometry.size == len(frames) * PAGE_SIZE
    assert geometry.pages == len(frames)
    edges = [
        pfn + step for first, count in geometry.pfn_runs() for pfn in (first, first + count) for step in (-1, 0, 1)
    ]
    for pfn in [*edges, data.draw(st.integers(0, 1 << 22))]:
        page = geometry.page_of_pfn(pfn)
        assert page == frames.get(pfn)
        if page is not None:
            assert geometry.pfn_of_page(page) == pfn
    with pytest.raises(IndexError):
        geometry.pfn_of_page(len(frames))
    assert list(geometry.pfn_runs()) == sorted(
        (region.guest_address // PAGE_SIZE, region.size // PAGE_SIZE) for region in geometry.regions
    )
    assert geometry == Geometry(geometry.regions)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([("a", 0, 4096, 4096)], "region 'a' does not begin where the one before it ends"),
        ([("a", 0, 4096, 0), ("b", 8192, 4096, 8192)], "region 'b' does not begin"),
        ([("a", 0, 0, 0)], "region 'a' does not begin"),
        ([("a", 1, 4096, 0)], "region 'a' is not made of whole pages"),
        ([("a", 0, 100, 0)], "region 'a' is not made of whole pages"),
        ([("a", 4096, 8192, 0), ("b", 0, 8192, 8192)], "regions 'b' and 'a' overlap"),
    ],
)
def test_regions_that_cannot_be(regions: list[tuple[str, int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry(tuple(Region(*region) for region in regions))


def test_nothing() -> None:
    geometry = Geometry(())
    assert (geometry.size, geometry.page_of_pfn(0), list(geometry.pfn_runs())) == (0, None, [])
