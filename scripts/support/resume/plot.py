"""The picture: for each link how long each way takes, on a logarithmic scale."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from support.resume.links import Network
from support.resume.result import Result
from support.resume.ways import Imagefs

OURS, OTHERS = "#0b6e4f", "#8d99ae"
MARKERS = ("o", "D", "s")
SIZES = (7.0, 5.0, 5.0)


def draw(result: Result, directory: Path) -> None:
    """``resume.png`` and ``resume.svg`` in ``directory``; the same result gives the same files."""
    mpl.rcParams.update({"svg.hashsalt": "imagefs", "svg.fonttype": "none", "font.size": 9})
    links = [link for link in result.links if any(resume.link == link.name for resume in result.resumes)]
    figure = Figure(figsize=(2.4 + 2.1 * len(links), 1.5 + 0.32 * len(result.ways)), layout="constrained")
    panels = figure.subplots(1, len(links), sharex=True, sharey=True, squeeze=False)[0]
    for panel, link in zip(panels, links, strict=True):
        _draw_link(panel, result, link)
    panels[0].set_yticks(range(len(result.ways)), [way.label for way in result.ways])
    panels[0].invert_yaxis()
    handles = [
        Line2D([], [], color="black", marker=marker, markersize=size, linestyle="", label=_label(gets))
        for gets, marker, size in zip(result.counts, MARKERS, SIZES, strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.supxlabel("seconds from the first command, logarithmic; ▸ not reached within the time limit", fontsize=9)
    figure.savefig(directory / "resume.png", dpi=150, metadata={"Software": None})
    figure.savefig(directory / "resume.svg", metadata={"Date": None})


def _draw_link(panel: Axes, result: Result, link: Network) -> None:
    for row, way in enumerate(result.ways):
        resume = result.of(link.name, way.name)
        if resume is None:
            continue
        colour = OURS if isinstance(way, Imagefs) else OTHERS
        at = [each.seconds for each in resume.milestones]
        if resume.limit is not None:
            panel.plot(resume.limit, row, marker=">", color=colour, markersize=6, clip_on=False, zorder=3)
            panel.plot(
                [at[-1] if at else resume.limit, resume.limit], [row, row], color=colour, linestyle=":", zorder=1
            )
        if at:
            panel.plot([at[0], at[-1]], [row, row], color=colour, linewidth=1.2, zorder=1)
        for each, marker, size in zip(resume.milestones, MARKERS, SIZES, strict=False):
            filled = colour if each.gets == 1 else "white"
            panel.plot(
                each.seconds, row, marker=marker, color=colour, markerfacecolor=filled, markersize=size, zorder=2
            )
    panel.set_xscale("log")
    panel.set_title(link.label, fontsize=9)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(axis="x", which="major", color="#e5e5e5")
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.tick_params(axis="y", length=0)


def _label(gets: int) -> str:
    return "first correct GET" if gets == 1 else f"{gets:,} GETs"
