"""The three panels of the comparison picture, each a function that draws on the axes it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.evaluation.compare import PolicySamples

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

# Okabe and Ito's palette, distinct under every common colour blindness; the baseline is blue.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#555555"


def display_name(name: str) -> str:
    """Policy name for people: the acronyms of our stages in capitals, others as they are."""
    return name.upper() if name in {"sft", "ppo"} else name


def score_histograms(axes: Axes, samples: Sequence[PolicySamples], judge: str) -> None:
    """Overlaid histograms of the judge's scores on common bins, with the means as dashed lines."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    every = np.concatenate([np.asarray(policy.scores[judge], dtype=np.float64) for policy in samples])
    # Probabilities and compound scores keep their natural range, so that pictures of two runs can be compared.
    low, high = float(every.min()), float(every.max())
    if low >= 0.0 and high <= 1.0:
        low, high = 0.0, 1.0
    elif low >= -1.0 and high <= 1.0:
        low, high = -1.0, 1.0
    bins = np.linspace(low, high if high > low else low + 1.0, 21).tolist()
    for index, policy in enumerate(samples):
        scores = np.asarray(policy.scores[judge], dtype=np.float64)
        colour, weights = _colour(index), np.full(len(scores), 100.0 / len(scores))
        axes.hist(scores, bins, weights=weights, color=colour, alpha=0.35)
        label = f"{display_name(policy.name)}, mean {scores.mean():.2f}"
        axes.hist(scores, bins, weights=weights, histtype="step", color=colour, linewidth=1.6, label=label)
    axes.set_xlim(bins[0], bins[-1])
    # Room above the bars, so that the legend covers neither them nor the lines of the means.
    headroom = 1.08 + 0.08 * len(samples)
    axes.set_ylim(0, axes.get_ylim()[1] * headroom)
    for index, policy in enumerate(samples):
        mean = float(np.mean(policy.scores[judge]))
        axes.axvline(mean, 0, 1 / headroom, color=_colour(index), linestyle="--", linewidth=1.6)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    probability = (bins[0], bins[-1]) == (0.0, 1.0)
    axes.set_xlabel(f"{judge}: P(good) of a response" if probability else f"{judge}: score of a response")
    axes.set_ylabel("share of responses")
    axes.set_title("How good the judge finds the responses")
    axes.legend(loc="upper left", frameon=False)
    tidy(axes)


def reward_against_kl(axes: Axes, history: pd.DataFrame | None) -> None:
    """Mean reward score against KL, a point per PPO step coloured by the step, evaluations as diamonds."""
    axes.set_title("What the KL bought during PPO")
    axes.set_xlabel("KL to the reference, nats per response")
    axes.set_ylabel("mean reward score")
    tidy(axes)
    train = _curve(history, "objective/kl", "objective/scores")
    if train is None:
        axes.text(0.5, 0.5, "no PPO history", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    step, kl, score = train
    axes.plot(kl, score, color="#bbbbbb", linewidth=0.8, zorder=1)
    points = axes.scatter(kl, score, c=step, cmap="viridis", s=22, zorder=2, label="sampled during training")
    bar = axes.figure.colorbar(points, ax=axes, pad=0.02, aspect=30)
    bar.set_label("PPO step")
    bar.outline.set_visible(False)
    evaluations = _curve(history, "eval/kl", "eval/scores")
    if evaluations is not None:
        _, kl, score = evaluations
        axes.plot(
            kl, score, linestyle="none", marker="D", markersize=7, markerfacecolor="white",
            markeredgecolor=COLOURS[1], markeredgewidth=1.8, zorder=3, label="evaluation during training",
        )  # fmt: skip
    axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)


def summary_bars(figure: Figure, place: SubplotSpec, result: Mapping[str, Any], judge: str) -> None:
    """Win rate with its interval above small bars of length, EOS rate and distinct-2."""
    metrics = result["metrics"]
    first, *others = result["policies"]
    rows = place.subgridspec(4, 1, height_ratios=[1.0 + 0.35 * (len(others) - 1), 1.25, 1.25, 1.25], hspace=0.08)
    _win_rates(figure.add_subplot(rows[0]), metrics, first, others, judge)
    measures = [
        ("response length, tokens", "length_mean", ".1f", None),
        ("EOS rate", "eos_rate", ".0%", 1.0),
        ("distinct-2", "distinct_2", ".2f", None),
    ]
    for position, (title, key, form, limit) in enumerate(measures, start=1):
        axes = figure.add_subplot(rows[position])
        values = [metrics[f"{name}/{key}"] for name in result["policies"]]
        # Range past the longest bar, so that its number stands inside the panel.
        reach = 1.18 * (limit or max(*values, 1e-9))
        for index, value in enumerate(values):
            axes.barh(index, value, color=_colour(index), height=0.72)
            axes.text(value + 0.015 * reach, index, format(value, form), va="center", fontsize=10)
        axes.set_xlim(0, reach)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_yticks(range(len(values)), [display_name(name) for name in result["policies"]])
        axes.set_xticks([])
        axes.set_title(title, loc="left", fontsize=10.5)
        tidy(axes, bottom=False)
        axes.tick_params(axis="y", length=0)


def _win_rates(axes: Axes, metrics: Mapping[str, float], first: str, others: Sequence[str], judge: str) -> None:
    for index, name in enumerate(others):
        key = f"{name}_vs_{first}/win_rate_{judge}"
        value, low, high = (metrics[key + suffix] for suffix in ("", "_low", "_high"))
        axes.plot([low, high], [index, index], color=_colour(index + 1), linewidth=4, solid_capstyle="butt", alpha=0.55)
        axes.plot(value, index, marker="o", markersize=8, color=_colour(index + 1))
        # The text stands at the far end of the half where the interval is not.
        axes.text(
            *((0.02, index) if value > 0.5 else (0.98, index)), f"{value:.0%} [{low:.0%}, {high:.0%}]",
            ha="left" if value > 0.5 else "right", va="center", fontsize=10,
        )  # fmt: skip
    axes.axvline(0.5, color=GREY, linestyle=":", linewidth=1.4, zorder=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(others) - 0.5, -0.5)
    axes.set_yticks(range(len(others)), [display_name(name) for name in others])
    axes.set_xticks([0, 0.5, 1.0], ["0%", "50%", "100%"], fontsize=9)
    axes.set_title(f"win rate over {display_name(first)} by {judge}, 95 % interval", loc="left", fontsize=10.5)
    tidy(axes)
    axes.tick_params(axis="y", length=0)


def _curve(history: pd.DataFrame | None, x: str, y: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(step, x, y) of the rows that have all three, or None where there is no such row."""
    if history is None or not {"ppo_step", x, y}.issubset(history.columns):
        return None
    rows = history[["ppo_step", x, y]].dropna().to_numpy(dtype=np.float64)
    return (rows[:, 0], rows[:, 1], rows[:, 2]) if len(rows) else None


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def tidy(axes: Axes, bottom: bool = True) -> None:
    """Takes away the lines of the frame that say nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["bottom"].set_visible(bottom)
