"""Where a run comes from, as a picture: data sets above, stages from left to right, an arrow for everything read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from rlhf.artifacts import Artifact
from rlhf.evaluation.curves import Run
from rlhf.reward.gate import REPORT
from rlhf.reward.page import escaped

WIDTH, GAP, HEIGHT = 172, 36, 92  # of a stage's box and between two, in SVG units
DATA_HEIGHT, DATA_Y, STAGE_Y = 50, 8, 128
ARC = 26  # how deep an arrow goes below the boxes, for each that it passes
LETTERS = {"data": 20}  # of a title that fit into a box


@dataclass
class Node:
    """A box of the picture; `x` is its left edge."""

    title: str
    lines: list[str]
    x: float
    kind: str = "stage"

    @property
    def middle(self) -> float:
        """Of its width."""
        return self.x + WIDTH / 2


def lineage_svg(run: Run) -> str:
    """The picture as an <svg> element. An input that is not what the stage was made from any more has a red arrow."""
    stages = {name: _stage_node(artifact) for name, artifact in run.stages.items()}
    outside = [name for artifact in run.stages.values() for name in artifact.manifest["inputs"] if name not in stages]
    for name in dict.fromkeys(outside):
        stages[name] = Node(PurePath(name).name, ["from another run", ""], 0.0, "outside")
    order = sorted(stages, key=lambda name: (_depth(run, name), list(stages).index(name)))
    for place, name in enumerate(order):
        stages[name].x = 4 + place * (WIDTH + GAP)
    data = _data_nodes(run, stages)
    arrows, deepest = [], 0
    for name, artifact in run.stages.items():
        for used, digest in artifact.manifest["inputs"].items():
            stale = used in run.stages and run.stages[used].hash != digest
            span = order.index(name) - order.index(used)
            deepest = max(deepest, span)
            arrows.append(_arrow(stages[used], stages[name], span, stale))
        for used in _data_of(artifact):
            arrows.append(_data_arrow(data[used], stages[name]))
    right = max(node.x for node in [*stages.values(), *data.values()]) + WIDTH + 4
    bottom = STAGE_Y + HEIGHT + 6 + (0.75 * ARC * deepest if deepest > 1 else 0)
    boxes = [_box(node) for node in [*data.values(), *stages.values()]]
    return (
        f"<svg class='lineage' viewBox='0 0 {right:.0f} {bottom:.0f}' role='img' aria-label='lineage of the run'>"
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path class='tip' d='M0 0L8 4L0 8z'/></marker></defs>{''.join(arrows)}{''.join(boxes)}</svg>"
    )


def _stage_node(artifact: Artifact) -> Node:
    manifest = artifact.manifest
    seconds = float(manifest["wall_seconds"])
    when = manifest.get("finished", "")[:16].replace("T", " ")
    lines = [
        artifact.hash[:12],
        f"{duration(seconds)}, {manifest['peak_memory_gib']:.1f} GiB",
        f"{when} UTC" if when else "date not recorded",
    ]
    return Node(artifact.path.name, lines, 0.0)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def _depth(run: Run, name: str, seen: tuple[str, ...] = ()) -> int:
    """Longest way from a stage that reads data alone; an artifact of another run stands first."""
    if name not in run.stages or name in seen:
        return -1 if name not in run.stages else 0
    return 1 + max((_depth(run, used, (*seen, name)) for used in run.stages[name].manifest["inputs"]), default=-1)


def _data_of(artifact: Artifact) -> dict[str, Any]:
    """Data sets that a stage read, those of a reward report from elsewhere among them."""
    try:
        report = json.loads((artifact.path / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or damaged: the part of the page about it says so
        report = {}
    other = {row["name"]: row["from"] for row in report.get("ood", []) if "from" in row}
    return artifact.manifest.get("data", {}) | other


def _data_nodes(run: Run, stages: dict[str, Node]) -> dict[str, Node]:
    """A box per data set, each as near to the stages that read it as the others let it."""
    found: dict[str, Any] = {}
    readers: dict[str, list[float]] = {}
    for stage, artifact in run.stages.items():
        for name, source in _data_of(artifact).items():
            found[name] = source
            readers.setdefault(name, []).append(stages[stage].x)
    nodes, free = {}, 4.0
    for name in sorted(found, key=lambda name: sum(readers[name]) / len(readers[name])):
        x = max(free, sum(readers[name]) / len(readers[name]))
        nodes[name] = Node(PurePath(name).name, [str(found[name].get("fingerprint", ""))[:12]], x, "data")
        free = x + WIDTH + 12
    return nodes


def _arrow(start: Node, end: Node, span: int, stale: bool) -> str:
    """Straight to the next stage; below the others to one further on."""
    kind = "arrow stale" if stale else "arrow"
    if span == 1:
        y = STAGE_Y + HEIGHT / 2
        return f"<path class='{kind}' marker-end='url(#tip)' d='M{start.x + WIDTH:.0f} {y}H{end.x - 2:.0f}'/>"
    y, low = STAGE_Y + HEIGHT, STAGE_Y + HEIGHT + ARC * span
    first, last = start.middle + 24, end.middle - 18 * span
    return (
        f"<path class='{kind}' marker-end='url(#tip)' "
        f"d='M{first:.0f} {y}C{first:.0f} {low} {last:.0f} {low} {last:.0f} {y + 2}'/>"
    )


def _data_arrow(data: Node, stage: Node) -> str:
    top, bottom = DATA_Y + DATA_HEIGHT, STAGE_Y - 2
    bend = (top + bottom) / 2
    path = f"M{data.middle:.0f} {top}C{data.middle:.0f} {bend} {stage.middle:.0f} {bend} {stage.middle:.0f} {bottom}"
    return f"<path class='arrow data' marker-end='url(#tip)' d='{path}'/>"


def _box(node: Node) -> str:
    y, height = (DATA_Y, DATA_HEIGHT) if node.kind == "data" else (STAGE_Y, HEIGHT)
    fits = LETTERS.get(node.kind, 18)
    title = node.title
    if len(title) > fits:  # in the middle: names of one family differ at the end
        title = f"{title[: fits // 2]}…{title[len(title) - (fits - 1 - fits // 2) :]}"
    lines = "".join(
        f"<text class='{'hash' if number == 0 and node.kind != 'outside' else 'small'}' x='{node.x + 12:.0f}' "
        f"y='{y + 40 + 18 * number}'>{escaped(line)}</text>"
        for number, line in enumerate(node.lines)
    )
    return (
        f"<g class='node {node.kind}'><title>{escaped(node.title)}</title>"
        f"<rect x='{node.x:.0f}' y='{y}' width='{WIDTH}' height='{height}' rx='9'/>"
        f"<text class='name' x='{node.x + 12:.0f}' y='{y + 21}'>{escaped(title)}</text>{lines}</g>"
    )
