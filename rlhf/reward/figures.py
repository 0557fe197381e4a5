"""A report on a reward model as tables and figures: what its page and `notebooks/reward_model.ipynb` show.

Every function takes the plain data of report.json and loads no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rlhf.evaluation.curves import Run, RunError
from rlhf.reward.gate import REPORT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler

Report = Mapping[str, Any]

# Okabe and Ito's palette, distinct under every common colour blindness.
_BLUE, _ORANGE, _GREEN, _GREY, _RED = "#0072B2", "#D55E00", "#009E73", "#666666", "#B00020"
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
}
_CANVAS_PER_ROW = 0.27  # inches
_SHOWN_ANSWER = 300  # characters of an answer in a table
_FEWEST_SHOWN = 10  # pairs: a bar over fewer is as wide as the figure


def report_of(run: Run, stage: str = "reward") -> dict[str, Any]:
    """report.json of a run's reward model.

    Raises:
        RunError: the run has no such stage, or it was made without a report.
    """
    artifact = run.stages.get(stage)
    if artifact is None:
        raise RunError(f"run {run.name}: no stage {stage}: `make reward` makes one")
    path = artifact.path / REPORT
    if not path.is_file():
        raise RunError(f"run {run.name}: {stage} has no {REPORT}: `make report STAGE=reward` makes one")
    return json.loads(path.read_text(encoding="utf-8"))


def styled(frame: pd.DataFrame) -> Styler:
    """A table for people: escaped text, wrapped columns, no row numbers. The same table gives the same HTML."""
    style = frame.style.format(escape="html", precision=2).hide(axis="index").set_uuid("_".join(frame.columns)[:8])
    style = style.set_properties(**{"text-align": "left", "vertical-align": "top"}, subset=None)
    style = style.set_properties(subset=None, **{"white-space": "pre-wrap", "max-width": "26em"})
    return style.set_table_attributes('class="tex2jax_ignore"')  # dollars in a text are no formulas


# ------------------------------------------------------------------------------------------------------------- tables
def checks_table(report: Report) -> pd.DataFrame:
    """The gate: one row per check with its verdict and reason, worst first."""
    order = {"fail": 0, "warn": 1, "pass": 2}
    rows = sorted(report["gate"]["checks"], key=lambda check: order[check["verdict"]])
    return pd.DataFrame(rows, columns=["verdict", "name", "reason", "remedy"])


def accuracy_frame(report: Report) -> pd.DataFrame:
    """Accuracy of the model and of the baselines, over all pairs and every slice of them, in per cent."""
    rows = []
    for row in report["slices"]:
        found = row["accuracy"]
        rows.append(
            {
                "slice": row["slice"],
                "value": row["value"],
                "pairs": found["n"],
                "accuracy": percent(found["value"]),
                "95 % interval": f"{percent(found['low'])} to {percent(found['high'])}",
            }
            | {name: percent(value) for name, value in row["baselines"].items()}
        )
    return pd.DataFrame(rows)


def bias_frame(report: Report) -> pd.DataFrame:
    """Of each countable feature of an answer: how often more of it wins with the model and with the labels."""
    rows = [
        {
            "feature": row["feature"],
            "pairs that differ": row["n"],
            "correlation with the score": f"{row['correlation']:+.2f}",
            "model prefers more": percent(row["model"]),
            "labels prefer more": percent(row["labels"]),
            "difference": f"{100 * row['excess']['value']:+.1f} [{100 * row['excess']['low']:+.1f}, "
            f"{100 * row['excess']['high']:+.1f}]",
        }
        for row in report["biases"]
    ]
    return pd.DataFrame(rows)


def edits_frame(report: Report) -> pd.DataFrame:
    """What each edit of an answer does to its score."""
    rows = []
    for row in report["edits"]:
        measured = bool(row["n"])
        gain = row.get("gain", {})
        rows.append(
            {
                "edit": row["edit"],
                "what": row["meaning"],
                "answers": row["n"],
                "gain, std": f"{gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
                if measured
                else "too long",
                "gained": percent(row["rose"]) if measured else "",
                "worse answer wins": percent(row["wins"]["value"]) if measured else "",
                "before the edit": percent(row["wins_before"]) if measured else "",
            }
        )
    return pd.DataFrame(rows)


def relevance_frame(report: Report) -> pd.DataFrame:
    """Good answers to other prompts against the own one; the single answer that beats the most."""
    off_topic, blanket = report["relevance"]["off_topic"], report["relevance"].get("blanket")
    gain = off_topic["gain"]
    rows = [
        {
            "answer": "the better one to another prompt",
            "n": off_topic["n"],
            "gain, std": f"{gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]",
            "beats the own answer": _interval(off_topic["wins"]),
        }
    ]
    if blanket:
        text = blanket["answer"]
        shown = text if len(text) <= _SHOWN_ANSWER else text[: _SHOWN_ANSWER - 1] + "…"
        wins = _interval(blanket["wins"])
        rows.append({"answer": shown, "n": blanket["n"], "gain, std": "", "beats the own answer": wins})
    return pd.DataFrame(rows)


def _interval(found: Mapping[str, float]) -> str:
    return f"{percent(found['value'])} [{percent(found['low'])}, {percent(found['high'])}]"


def invariance_frame(report: Report) -> pd.DataFrame:
    """Padding and batch size: the largest change of a score. Paraphrases: the share of preferences that turn."""
    rows = [
        {"changed": row["way"], "n": row["n"], "effect": f"scores move by up to {row['largest']:.2g} std"}
        for row in report["padding"]
    ]
    for row in report["paraphrases"]:
        effect = "too long"
        if row["n"]:
            turned, before, after = percent(row["flips"]["value"]), percent(row["before"]), percent(row["after"])
            effect = f"{turned} of the preferences turn; accuracy {before} before, {after} after"
        rows.append({"changed": f"prompt as “{row['template']}”", "n": row["n"], "effect": effect})
    return pd.DataFrame(rows, columns=["changed", "n", "effect"])


def ood_frame(report: Report) -> pd.DataFrame:
    """Accuracy on preference sets that the model was not trained for."""
    rows = [
        {
            "set": row["name"],
            "pairs": row["accuracy"]["n"],
            "accuracy": percent(row["accuracy"]["value"]),
            "95 % interval": f"{percent(row['accuracy']['low'])} to {percent(row['accuracy']['high'])}",
            "longer answer is better": percent(row["longer_is_better"]),
            "left out, too long": row["left_out"],
        }
        for row in report["ood"]
    ]
    return pd.DataFrame(rows)


def failures_frame(report: Report) -> pd.DataFrame:
    """Pairs that the model ranks wrong, as text, with both scores."""
    kinds = {"surest": "sure of it", "nearest": "nearly right"}
    rows = [
        {
            "kind": kinds[row["kind"]],
            "prompt": row["prompt"],
            "better by label": row["chosen"],
            "its score": round(row["chosen_score"], 2),
            "worse by label": row["rejected"],
            "that score": round(row["rejected_score"], 2),
        }
        for row in report["failures"]
    ]
    return pd.DataFrame(rows)


def percent(share: float) -> str:
    """0.744 as `74.4 %`."""
    return f"{100 * share:.1f} %"


# ------------------------------------------------------------------------------------------------------------ figures
def plot_slices(report: Report) -> Figure:
    """Accuracy with its interval by slice, and the baselines beside it. Slices of fewer than 10 pairs are left out."""
    rows = [row for row in report["slices"] if row["accuracy"]["n"] >= _FEWEST_SHOWN][::-1]
    with _figure(1, (9.5, 1.2 + _CANVAS_PER_ROW * len(rows))) as (figure, (axes,)):
        for place, row in enumerate(rows):
            found, main = row["accuracy"], row["slice"] == "all"
            axes.plot([found["low"], found["high"]], [place, place], color=_BLUE, linewidth=3 if main else 1.8)
            axes.plot(found["value"], place, "o", color=_BLUE, markersize=7 if main else 5)
            for (_, value), colour, marker in zip(row["baselines"].items(), (_GREY, _ORANGE), "|d", strict=False):
                axes.plot(value, place, marker, color=colour, markersize=9 if marker == "|" else 5, linestyle="none")
        axes.set_yticks(range(len(rows)), [_slice_name(row) for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.axvline(0.5, color=_GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("share of pairs ranked right (bar: 95 % interval; dotted: a coin)")
        axes.set_title("Accuracy by slice", loc="left")
        _percent_axis(axes.xaxis)
        axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
        axes.set_axisbelow(True)
        handles = [_handle("o", _BLUE, "reward model")]
        names = report["slices"][0]["baselines"]
        handles += [_handle(m, c, name) for name, c, m in zip(names, (_GREY, _ORANGE), "|d", strict=False)]
        axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)
    return figure


def _slice_name(row: Mapping[str, Any]) -> str:
    alone = row["slice"] in ("all", "length")
    name = row["value"] if alone else f"{row['slice']}: {row['value']}"
    return f"{name[:44]}  ({row['accuracy']['n']})"


def _handle(marker: str, colour: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=marker, color=colour, linestyle="none", label=label, markersize=7)


def plot_calibration(report: Report) -> Figure:
    """How often it is right at each confidence, and how its margins are spread."""
    curve, table = report["calibration"], report["table"]
    margins = np.array(table["chosen"]) - np.array(table["rejected"])
    with _figure(2, (9.5, 3.5)) as (figure, (left, right)):
        confidence = [item["confidence"] for item in curve["bins"]]
        left.plot([0.5, 1], [0.5, 1], color=_GREY, linestyle=":", linewidth=1.2, label="calibrated")
        found = [item["accuracy"] for item in curve["bins"]]
        left.plot(confidence, found, color=_BLUE, linewidth=1.4, zorder=3, label="reward model")
        sizes = [12 + 160 * item["n"] / report["pairs"] for item in curve["bins"]]
        left.scatter(confidence, found, s=sizes, color=_BLUE, zorder=4)
        left.set_title(
            f"Calibration: error {curve['ece']:.3f}, best temperature {curve['temperature']:.2f}", loc="left"
        )
        left.set_xlabel("its confidence, sigmoid of |margin| (dot: number of pairs)")
        left.set_ylabel("share that is right")
        left.legend(loc="lower right")
        _percent_axis(left.xaxis)
        _percent_axis(left.yaxis)
        bins = np.linspace(margins.min(), margins.max() + 1e-9, 41)
        right.hist(margins[margins > 0], bins.tolist(), color=_BLUE, alpha=0.75, label="right")
        right.hist(margins[margins <= 0], bins.tolist(), color=_RED, alpha=0.65, label="wrong")
        right.set_title("Margins", loc="left")
        right.set_xlabel("score of the better answer minus that of the worse one")
        right.set_ylabel("pairs")
        right.legend(loc="upper right")
    return figure


def plot_scores(report: Report) -> Figure:
    """The scores of better and worse answers, and the score against the length of an answer."""
    table = report["table"]
    chosen, rejected = np.array(table["chosen"]), np.array(table["rejected"])
    with _figure(2, (9.5, 3.5)) as (figure, (left, right)):
        both = np.concatenate([chosen, rejected])
        bins = np.linspace(both.min(), both.max() + 1e-9, 41).tolist()
        for scores, colour, name in ((rejected, _ORANGE, "worse answers"), (chosen, _BLUE, "better answers")):
            left.hist(scores, bins, color=colour, alpha=0.35)
            label = f"{name}, mean {scores.mean():.2f}"
            left.hist(scores, bins, histtype="step", color=colour, linewidth=1.5, label=label)
        left.set_title("Scores", loc="left")
        left.set_xlabel("raw score")
        left.set_ylabel("answers")
        left.set_ylim(0, left.get_ylim()[1] * 1.25)
        left.legend(loc="upper left")
        lengths = np.concatenate([table["chosen_tokens"], table["rejected_tokens"]])
        right.scatter(lengths, both, s=5, color=_BLUE, alpha=0.25, linewidths=0, rasterized=True)
        middle, mean = _running_mean(lengths, both)
        right.plot(middle, mean, color=_RED, linewidth=2, label="mean")
        row = next((row for row in report["biases"] if row["feature"] == "length in tokens"), None)
        title = f"Score against length: correlation {row['correlation']:+.2f}" if row else "Score against length"
        right.set_title(title, loc="left")
        right.set_xlabel("tokens of the answer")
        right.set_ylabel("raw score")
        right.legend(loc="upper right")
    return figure


def _running_mean(x: np.ndarray, y: np.ndarray, parts: int = 10) -> tuple[list[float], list[float]]:
    """Means of y over parts of equally many points, ordered by x."""
    order = np.array_split(np.argsort(x, kind="stable"), min(parts, len(x)))
    return [float(x[part].mean()) for part in order], [float(y[part].mean()) for part in order]


def plot_edits(report: Report) -> Figure:
    """The mean gain of each edit with its interval, and the bound of the gate."""
    rows = [row for row in report["edits"] if row["n"]][::-1]
    bound = report["gate"]["thresholds"]["max_edit_gain"]
    with _figure(1, (9.5, 1.1 + 0.36 * len(rows))) as (figure, (axes,)):
        for place, row in enumerate(rows):
            gain = row["gain"]
            above = bound is not None and gain["value"] > bound
            axes.barh(place, gain["value"], height=0.62, color=_RED if above else _BLUE, alpha=0.8)
            axes.plot([gain["low"], gain["high"]], [place, place], color="#222222", linewidth=1.6)
        axes.set_yticks(range(len(rows)), [row["edit"] for row in rows])
        axes.axvline(0, color="#222222", linewidth=0.8)
        if bound is not None:
            axes.axvline(bound, color=_GREY, linestyle=":", linewidth=1.3)
            axes.annotate("gate", (bound, 1.0), xycoords=("data", "axes fraction"), xytext=(3, 2),
                          textcoords="offset points", fontsize=9, color=_GREY)  # fmt: skip
        axes.set_xlabel("mean change of the score, in std of the scores (line: 95 % interval)")
        axes.set_title("The same answer, edited: none of these should gain", loc="left")
    return figure


def plot_learning_curve(report: Report) -> Figure:
    """Held-out accuracy of a linear reward on frozen features by number of labels; the trained model's beside it."""
    curve = report["learning_curve"]
    with _figure(1, (9.5, 3.3)) as (figure, (axes,)):
        labels = [row["labels"] for row in curve]
        axes.fill_between(
            labels, [row["low"] for row in curve], [row["high"] for row in curve], color=_GREEN, alpha=0.18, linewidth=0
        )
        axes.plot(
            labels, [row["accuracy"] for row in curve], "o-", color=_GREEN, label="linear on frozen features (3 draws)"
        )
        found = report["accuracy"]
        axes.errorbar(
            [report["train_pairs"]], [found["value"]],
            [[found["value"] - found["low"]], [found["high"] - found["value"]]],
            fmt="D", color=_BLUE, capsize=4, label="this reward model",
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("labelled pairs trained on")
        axes.set_ylabel("held-out accuracy")
        axes.set_title("Would more labels help?", loc="left")
        _percent_axis(axes.yaxis)
        axes.grid(axis="y", color="#eeeeee")
        axes.legend(loc="upper left")
    return figure


@contextmanager
def _figure(columns: int, size: tuple[float, float]) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with a row of axes, in our style while it is drawn on, without pyplot's global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=100, facecolor="white", layout="constrained")
        yield figure, list(np.atleast_1d(figure.subplots(1, columns)))


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def coin_nll() -> float:
    """Nats per pair of a model that knows nothing."""
    return math.log(2)
