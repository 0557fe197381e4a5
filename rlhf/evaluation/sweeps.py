"""Runs of one recipe with different values and seeds: which there are, and one table out of them."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from rlhf.artifacts import Artifact, check_name
from rlhf.errors import UserError

SHOWN = (r"ppo/.*_mean", r"ppo/eos_rate", r"ppo/distinct_2", r"ppo_vs_sft/win_rate_\w+")
Point = dict[str, str]  # setting -> value, as they are given to a stage


def points(over: Sequence[str]) -> list[Point]:
    """Every combination of `section.key=a,b,c`, the last key fastest.

    Raises:
        UserError: not of that form, or a key twice.
    """
    keys, values = [], []
    for item in over:
        key, equals, given = item.partition("=")
        if not equals or not key or not all(given.split(",")):
            raise UserError(f"--over {item!r}: not of the form section.key=a,b,c, for example ppo.kl_coef=0.05,0.1")
        if key in keys:
            raise UserError(f"--over {key}: given twice: put all values behind one, separated by commas")
        keys.append(key)
        values.append(given.split(","))
    return [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*values)]


def is_seed(key: str) -> bool:
    """Whether a table takes the mean over this setting: `seed`, or the seed of one stage, such as `ppo.seed`."""
    return key == "seed" or key.endswith(".seed")


def run_name(base: str, point: Point) -> str:
    """Folder of a point's run, such as `tiny-kl_coef_0.1-seed_1`."""
    parts = [re.sub(r"[^\w.+-]", "", f"{key.rpartition('.')[2]}_{value}") for key, value in point.items()]
    return check_name("-".join([base, *parts]), "--over")


def table(root: Path, base: str, over: Sequence[Point], stage: str, metrics: Sequence[str] = ()) -> list[list[str]]:
    """One row per combination of values: the mean over its seeds and its standard deviation, of a stage's metrics.

    Args:
        root: the artifact directory.
        base: what the names of the runs begin with.
        over: see `points`.
        stage: whose manifest has the metrics.
        metrics: their names; none = those of SHOWN.

    Returns:
        A head and rows of texts: values, finished runs, metrics.

    Raises:
        UserError: no run of these is finished, or none has such a metric.
    """
    groups: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for point in over:
        place = root / run_name(base, point) / stage
        found = groups.setdefault(tuple(value for key, value in point.items() if not is_seed(key)), [])
        if place.is_dir():
            found.append(Artifact.load(place).manifest["metrics"])
    known = {name for rows in groups.values() for row in rows for name in row}
    if not known:
        raise UserError(f"sweep: no finished {stage} stage of {len(over)} runs {root / base}-*: run the sweep first")
    missing = sorted(set(metrics) - known)
    if missing:
        raise UserError(
            f"--metrics {missing[0]}: the {stage} stage has no such metric, it has {', '.join(sorted(known))}"
        )
    shown = list(metrics) or [name for pattern in SHOWN for name in sorted(known) if re.fullmatch(pattern, name)]
    shown = [name for name in shown if metrics or not name.endswith(("_low", "_high"))] or sorted(known)
    head = [key for key in over[0] if not is_seed(key)] + ["runs", *shown]
    return [head] + [
        [*values, str(len(rows)), *(_cell([row[name] for row in rows if name in row]) for name in shown)]
        for values, rows in groups.items()
    ]


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"


def markdown(rows: list[list[str]]) -> str:
    """A table of `table`."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])
