"""Reward against the KL paid for it, as a table and a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.evaluation._panels import COLOURS, GREY, tidy
from rlhf.evaluation.policy_gate import not_measured, policy_gate
from rlhf.reward.gate import Verdict, verdict
from rlhf.reward.gate import lines as gate_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_NAME = "frontier.png"


def table_rows(curve: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows: best-of-n by rising n, then PPO by step; KL in nats, every score with its 95 % interval."""
    rows = [["policy", "KL, nats", *curve["scores"]]]
    for row in [*curve["best_of_n"], *curve["steps"]]:
        best_of = f"best of {row['n']}, at most" if row.get("n", 1) > 1 else "SFT"
        name = best_of if "n" in row else f"PPO step {row['step']}"
        if row.get("step") == curve["published"]:
            name += " (published)"
        rows.append([name, f"{row['kl']:.2f}", *(_cell(row["scores"][score]) for score in curve["scores"])])
    return rows


def sentences(curve: Mapping[str, Any]) -> list[str]:
    """What the table says: the step that each score would have kept, and what went wrong with the published one."""
    if not curve["steps"]:
        return []
    unseen = [f"{curve['best_steps'][score]} by {score}" for score in curve["unseen"]]
    rewarded = f"{curve['best_steps'][curve['trained']]} by {curve['trained']}, which PPO maximised"
    # Before the SFT model was held against the policy it was no candidate either.
    among = "the kept steps and the SFT model (step 0)" if "comparisons" in curve else "the kept steps"
    checks = policy_gate(curve)
    return [
        f"Published is step {curve['published']}. The best of {among} is {', '.join([*unseen, rewarded])}.",
        f"Gate of the policy: {verdict(checks).upper()}. It judges {curve['prompts']} prompts, and its intervals are "
        "wider than the table's: 95 % hold for all its comparisons together.",
        *(f"{line}." for line in gate_lines(checks, without=())),
        *(f"{name} was not measured: {remedy}." for name, remedy in not_measured(curve).items()),
    ]


def outcome(curve: Mapping[str, Any] | None) -> tuple[Verdict, str] | None:
    """Verdict of the policy's gate, and the names of what did not pass or was not measured; None without a policy."""
    checks = policy_gate(curve) if curve else []
    if not curve or not checks:
        return None
    names = ", ".join(dict.fromkeys(check.name for check in checks if check.verdict != "pass"))
    missing = ", ".join(not_measured(curve))
    return verdict(checks), "; ".join(filter(None, [names, missing and f"not measured: {missing}"]))


def plot_frontier(curve: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """One panel per score, best-of-n against the steps of PPO, and one in which all scores share an axis.

    Args:
        curve: from `rlhf.evaluation.stage.reward_against_kl`.
        path: of the PNG; its folder must exist.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scores = curve["scores"]
    panels = len(scores) + bool(curve["steps"])
    columns = 2 if panels == 4 else min(panels, 3)
    lines = -(-panels // columns)
    figure = Figure(figsize=(5.0 * columns, 4.1 * lines), dpi=130, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(lines, columns)
    places = [figure.add_subplot(grid[panel // columns, panel % columns]) for panel in range(panels)]
    for axes, score in zip(places, scores, strict=False):
        _against_kl(axes, curve, score)
    if curve["steps"]:
        _over_optimisation(places[-1], curve)
    figure.suptitle("Reward against the KL paid for it", fontsize=14, fontweight="bold")
    figure.savefig(path, metadata={"Software": None})
    return Path(path)


def _against_kl(axes: Axes, curve: Mapping[str, Any], score: str) -> None:
    best, steps = curve["best_of_n"], curve["steps"]
    _line(axes, best, score, COLOURS[0], "s", "best-of-n of the SFT model (KL at most)")
    for row in best[1:]:
        axes.annotate(str(row["n"]), (row["kl"], row["scores"][score]["value"]), xytext=(-3, 6),
                      textcoords="offset points", ha="right", fontsize=8, color=COLOURS[0])  # fmt: skip
    if steps:
        first = best[0]["scores"][score]["value"], min(steps, key=lambda row: row["step"])
        axes.plot([0, first[1]["kl"]], [first[0], first[1]["scores"][score]["value"]], color=COLOURS[1], linestyle=":")
        _line(axes, steps, score, COLOURS[1], "o", "PPO, a point per kept step")
        published = [row for row in steps if row["step"] == curve["published"]]
        axes.plot(
            [row["kl"] for row in published], [row["scores"][score]["value"] for row in published], linestyle="none",
            marker="o", markersize=13, markerfacecolor="none", markeredgecolor=GREY, label="published",
        )  # fmt: skip
    kind = (
        "maximised by PPO" if score == curve["trained"] else "not seen by PPO" if score in curve["unseen"] else "part"
    )
    axes.set_title(f"{score} ({kind})", fontsize=11)
    axes.set_xlabel("KL to the reference, nats per response")
    axes.set_ylabel(f"mean {score}")
    axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)
    tidy(axes)


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], score: str, colour: str, marker: str, label: str) -> None:
    rows = sorted(rows, key=lambda row: row["step"] if "step" in row else row["n"])
    points = [row["scores"][score] for row in rows]
    kl = [row["kl"] for row in rows]
    low, high = [point["low"] for point in points], [point["high"] for point in points]
    axes.vlines(kl, low, high, color=colour, alpha=0.35, linewidth=2)
    axes.plot(kl, [point["value"] for point in points], color=colour, marker=marker, markersize=5, label=label)


def _over_optimisation(axes: Axes, curve: Mapping[str, Any]) -> None:
    """All scores over the steps, as gains in standard deviations of the SFT samples' scores."""
    for index, score in enumerate(curve["scores"]):
        start, spread = curve["best_of_n"][0]["scores"][score]["value"], curve["sft_std"][score] or 1.0
        steps = [0, *(row["step"] for row in curve["steps"])]
        gains = [0.0, *((row["scores"][score]["value"] - start) / spread for row in curve["steps"])]
        trained = score == curve["trained"]
        axes.plot(steps, gains, color=COLOURS[index % len(COLOURS)], linestyle="-" if trained else "--", marker="o",
                  markersize=4, label=f"{score}{', maximised' if trained else ''}")  # fmt: skip
        best = curve["best_steps"][score]
        axes.plot(best, gains[steps.index(best)], marker="*", markersize=14, color=COLOURS[index % len(COLOURS)])
    axes.axvline(curve["published"], color=GREY, linestyle=":", linewidth=1.4)
    axes.set_title("Over-optimisation: do the others follow? (star: best step)", fontsize=11)
    axes.set_xlabel("PPO step (dotted: published)")
    axes.set_ylabel("gain, std of the SFT model's scores")
    axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)
    tidy(axes)


def _cell(point: Mapping[str, float]) -> str:
    return f"{point['value']:z.3f} [{point['low']:z.3f}, {point['high']:z.3f}]"
