"""The curves of a run as inline SVG, drawn by hand: they follow the page's colours and show their values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from rlhf.evaluation.curves import Run, logged
from rlhf.reward.page import escaped

WIDTH, HEIGHT = 400, 216
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 14, 30
MOST_POINTS = 300  # of a curve: longer ones are averaged in equal parts


@dataclass
class Line:
    """A curve: `kind` is its class in page.css, `x` and `y` finite numbers."""

    label: str
    kind: str
    x: list[float]
    y: list[float]


@dataclass
class Chart:
    """What one panel shows.

    Attributes:
        title, unit: above it.
        keys: (metric key, label) of its curves.
        alerts: names of the alerts that are about it.
        levels: settings of the stage that are drawn as dotted lines.
        low: lower end of the axis; None = from the data.
    """

    title: str
    unit: str
    keys: list[tuple[str, str]]
    alerts: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    low: float | None = None


def _both(train: str, held_out: str) -> list[tuple[str, str]]:
    return [(train, "sampled in training"), (held_out, "held-out prompts")]


def _one(key: str) -> list[tuple[str, str]]:
    return [(key, "")]


TRAINER = [
    Chart("Loss", "nats per token; of a reward model, per pair", [("loss", "training"), ("eval_loss", "held-out")]),
    Chart("Accuracy", "share of pairs ranked right", [("accuracy", "training"), ("eval_accuracy", "held-out")]),
    Chart("Margin", "chosen minus rejected score", _one("margin")),
    Chart("Right tokens", "share", _one("mean_token_accuracy")),
    Chart("Gradient norm", "before clipping", _one("grad_norm"), low=0.0),
    Chart("Learning rate", "", _one("learning_rate"), low=0.0),
]
PPO = [
    Chart(
        "Reward score",
        "mean of a response",
        _both("objective/scores", "eval/scores"),
        ("repetition", "refusals", "judge"),
    ),
    Chart(
        "KL to the reference", "nats per response", _both("objective/kl", "eval/kl"), ("kl",), ("kl_target", "max_kl")
    ),
    Chart("Score minus KL cost", "what PPO maximises", _both("objective/rlhf_reward", "eval/rlhf_reward")),
    Chart("Response length", "tokens", _both("rollout/response_length", "eval/response_length"), ("length",), low=0.0),
    Chart("EOS rate", "share of responses", _both("rollout/eos_rate", "eval/eos_rate"), ("eos_rate",), low=0.0),
    Chart("Entropy", "nats per response", _one("objective/entropy"), ("entropy",), low=0.0),
    Chart("Distinct-2", "of a step's responses", _one("rollout/distinct_2"), ("repetition",), low=0.0),
    Chart("Refusals", "share of responses", _one("rollout/refusal_rate"), ("refusals",), low=0.0),
    Chart("Explained variance", "of the critic", _one("val/explained_variance")),
    Chart("Clip fractions", "share of tokens", [("policy/clipfrac_avg", "policy"), ("val/clipfrac_avg", "value")]),
    Chart("Approximate KL of an update", "nats per token", _one("policy/approxkl_avg"), (), ("target_kl",), low=0.0),
    Chart("Policy loss", "per token", _one("loss/policy_avg")),
    Chart("Value loss", "half mean square", _one("loss/value_avg"), low=0.0),
    Chart("Gradient norm", "before clipping", _one("policy/grad_norm"), (), ("max_grad_norm",), low=0.0),
]
NO_CURVES = ("step", "epoch", "ppo_step", "episode", "optimizer_step", "train_loss")


@dataclass
class Panel:
    """A chart with its numbers."""

    chart: Chart
    lines: list[Line]
    fired: dict[str, list[float]] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)


def stage_charts(run: Run, stage: str, other: Run | None = None) -> tuple[str, str]:
    """The charts of a stage's metrics.jsonl as HTML: those one looks at first, and those of all other keys.

    Args:
        run: whose curves are drawn.
        stage: its folder.
        other: another run, whose curves lie dashed beneath where it has the stage.
    """
    table, beside = logged(run.metrics(stage)), logged(other.metrics(stage)) if other else pd.DataFrame()
    x = "ppo_step" if "ppo_step" in table.columns else "step"
    if table.empty or x not in table.columns or run.stages[stage].stage == "evaluate":  # its one row is a table
        return "", ""
    charts = PPO if x == "ppo_step" else TRAINER
    shown = {key for chart in charts for key, _ in chart.keys}
    rest = [key for key in table.columns if key not in shown and key not in NO_CURVES and not key.startswith("alerts/")]
    settings = run.stages[stage].manifest["recipe"].get(run.stages[stage].stage) or {}
    name = other.name if other else ""
    first = [draw(_panel(chart, table, beside, x, settings, name), x) for chart in charts]
    others = [draw(_panel(Chart(key, "", _one(key)), table, beside, x, settings, name), x) for key in sorted(rest)]
    return "".join(first), "".join(others)


def _panel(
    chart: Chart, table: pd.DataFrame, beside: pd.DataFrame, x: str, settings: dict[str, object], other: str
) -> Panel:
    lines = []
    for number, (key, label) in enumerate(chart.keys):
        lines += _line(table, x, key, label or "this run", f"c{number}")
    for key, _ in chart.keys[:1]:
        lines += _line(beside, x, key, other, "other")
    fired = {}
    for name in chart.alerts:
        marks = table.get(f"alerts/{name}")
        if marks is not None and (marks == 1).any():
            fired[name] = [float(step) for step in table.loc[marks == 1, x]]
    levels = {name: settings[name] for name in chart.levels}
    return Panel(chart, lines, fired, {k: float(v) for k, v in levels.items() if isinstance(v, int | float)})


def _line(table: pd.DataFrame, x: str, key: str, label: str, kind: str) -> list[Line]:
    if not {x, key}.issubset(table.columns):
        return []
    points = table[[x, key]].apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan).dropna()
    if points.empty:
        return []
    parts = np.array_split(points.to_numpy(dtype=np.float64), min(len(points), MOST_POINTS))
    means = [part.mean(axis=0).tolist() for part in parts]
    return [Line(label, kind, [point[0] for point in means], [point[1] for point in means])]


def draw(panel: Panel, x: str) -> str:
    """The panel as a <figure>; nothing where no curve has a point."""
    lines, chart = panel.lines, panel.chart
    if not lines:
        return ""
    low, high = _range([y for line in lines for y in line.y], chart.low, panel.levels)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    start, end = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    end = end if end > start else start + 1
    place = Scale(start, end, low, high)
    body = [*_grid(place, ticks, [tick for tick in nice_ticks(start, end, 6) if start <= tick <= end])]
    body += [_alert(place, name, steps) for name, steps in panel.fired.items()]
    body += [_level(place, name, value) for name, value in panel.levels.items()]
    body += [_curve(place, line) for line in sorted(lines, key=lambda line: line.kind != "other")]
    data = json.dumps([[line.label, line.kind, line.x, line.y] for line in lines])
    scale = json.dumps([start, end, low, high, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM])
    legend = "".join(f"<span class='key {line.kind}'>{escaped(line.label)}</span>" for line in lines)
    warned = "".join(f"<span class='alert'>alert: {escaped(name)}</span>" for name in panel.fired)
    unit = f" <small>{escaped(chart.unit)}</small>" if chart.unit else ""
    return (
        f"<figure class='panel'><figcaption><b>{escaped(chart.title)}</b>{unit}{warned}</figcaption>"
        f"<svg class='chart' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escaped(chart.title)}' "
        f"data-lines='{escaped(data)}' data-scale='{scale}' data-x='{'PPO step' if x == 'ppo_step' else 'step'}'>"
        f"{''.join(body)}</svg>{f'<div class=legend>{legend}</div>' if len(lines) > 1 else ''}</figure>"
    )


@dataclass
class Scale:
    """From numbers to places in the picture."""

    start: float
    end: float
    low: float
    high: float

    def x(self, value: float) -> float:
        """Column of a step."""
        return LEFT + (value - self.start) / (self.end - self.start) * (WIDTH - RIGHT - LEFT)

    def y(self, value: float) -> float:
        """Row of a value."""
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - BOTTOM - TOP)


def _range(values: Sequence[float], low: float | None, levels: dict[str, float]) -> tuple[float, float]:
    known = [*values, *levels.values()]
    bottom, top = min(known) if low is None else min(low, *known), max(known)
    if top > bottom:
        return bottom, top
    room = abs(top) * 0.1 or 1.0
    return bottom - (0 if low is not None else room), top + room


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `most` of them."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _grid(place: Scale, rows: Sequence[float], columns: Sequence[float]) -> list[str]:
    lines = [
        f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{place.y(tick):.1f}' y2='{place.y(tick):.1f}'/>"
        f"<text class='tick' x='{LEFT - 6}' y='{place.y(tick) + 3.5:.1f}' text-anchor='end'>{_number(tick)}</text>"
        for tick in rows
    ]
    for tick in columns:
        x, text = place.x(tick), _number(tick)
        side = "end" if x + 4 * len(text) > WIDTH else "middle"  # a number at the edge would be cut
        x = min(x + 4 * len(text), WIDTH) if side == "end" else x
        lines.append(f"<text class='tick' x='{x:.1f}' y='{HEIGHT - BOTTOM + 16}' text-anchor='{side}'>{text}</text>")
    return lines


def _number(value: float) -> str:
    return f"{value:.0e}" if value and abs(value) < 1e-3 else f"{value:,.10g}"


def _curve(place: Scale, line: Line) -> str:
    points = [f"{place.x(x):.1f} {place.y(y):.1f}" for x, y in zip(line.x, line.y, strict=True)]
    dots = ""
    if len(points) <= 12:  # few points, as evaluations have: each is shown
        dots = "".join(f"<circle cx='{p.split()[0]}' cy='{p.split()[1]}' r='2.6'/>" for p in points)
    return f"<g class='line {line.kind}'><path d='M{'L'.join(points)}'/>{dots}</g>"


def _alert(place: Scale, name: str, steps: Sequence[float]) -> str:
    """A band over the steps at which the alert fired."""
    half = 0.5 * (place.x(place.start + 1) - place.x(place.start))
    bands = []
    for step in steps:
        left, right = max(LEFT, place.x(step) - half), min(WIDTH - RIGHT, place.x(step) + half)
        bands.append(f"M{left:.1f} {TOP}H{right:.1f}V{HEIGHT - BOTTOM}H{left:.1f}z")
    return f"<path class='fired' data-alert='{escaped(name)}' d='{''.join(bands)}'/>"


def _level(place: Scale, name: str, value: float) -> str:
    y = place.y(value)
    return (
        f"<line class='level' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>"
        f"<text class='tick' x='{WIDTH - RIGHT}' y='{y - 4:.1f}' text-anchor='end'>{escaped(name)}</text>"
    )
