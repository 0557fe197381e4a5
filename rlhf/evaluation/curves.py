"""A finished run as tables and curves: what `notebooks/reward_curves.ipynb` shows.

Reads the artifact directory alone, loads no model, and draws what is there: a stage or a metric that a run lacks
leaves its panel empty with a note.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from rlhf.artifacts import MANIFEST, STAGES, Artifact
from rlhf.errors import UserError
from rlhf.evaluation._panels import reward_against_kl
from rlhf.evaluation.report import PICTURE_NAME, REPORT_NAME

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler

# Okabe and Ito's palette, distinct under every common colour blindness. Training is blue, held-out data orange.
_TRAIN, _HELD_OUT, _OTHERS = "#0072B2", "#D55E00", ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY, _ALARM = "#555555", "#CC0000"
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
}
_SMOOTH_FROM = 100  # rows; from here on the raw curve is faint and a running mean lies over it


class RunError(UserError):
    """No run to read. A notebook shows its one line without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython's hook
        return [f"Error: {self}"]


@dataclass(frozen=True)
class Run:
    """The finished stages of a run directory, in the order in which they run."""

    path: Path
    stages: dict[str, Artifact]

    @property
    def name(self) -> str:
        """Name of the run, its directory's."""
        return self.path.name

    def metrics(self, stage: str) -> pd.DataFrame:
        """metrics.jsonl of a stage; an empty table where the run lacks the stage."""
        return self.stages[stage].metrics() if stage in self.stages else pd.DataFrame()

    def samples(self, stage: str) -> pd.DataFrame:
        """samples.jsonl of a stage; an empty table where the run lacks the stage."""
        return self.stages[stage].samples() if stage in self.stages else pd.DataFrame()

    def headline(self, stage: str) -> dict[str, Any]:
        """Headline metrics in the manifest of a stage; empty where the run lacks the stage."""
        return self.stages[stage].manifest.get("metrics", {}) if stage in self.stages else {}

    def settings(self, stage: str) -> dict[str, Any]:
        """The stage's section of the recipe that it ran with; empty where the run lacks the stage."""
        return (self.stages[stage].manifest["recipe"].get(stage) or {}) if stage in self.stages else {}


def load_run(path: str | os.PathLike[str]) -> Run:
    """Reads the finished stages of a run.

    Args:
        path: `artifacts/<run>`. A relative one is looked up from the working directory, from the repository above a
            working directory `notebooks`, and from `notebooks` below it: a kernel starts in either.

    Raises:
        RunError: nothing there, no finished stage, or a damaged manifest.
    """
    here = Path.cwd()
    root = here.parent if here.name == "notebooks" else here
    found = next((base / path for base in (here, root, root / "notebooks") if (base / path).is_dir()), None)
    if found is None:
        raise RunError(
            f"run directory {os.fspath(path)}: not there: "
            "make a run with `make sft reward ppo`, or set RLHF_RUN_DIR to artifacts/<run>"
        )
    found = found.resolve()
    finished = [entry.parent for entry in found.glob(f"*/{MANIFEST}") if not entry.parent.suffix]
    finished.sort(key=lambda stage: (STAGES.index(stage.name) if stage.name in STAGES else len(STAGES), stage.name))
    if not finished:
        raise RunError(
            f"run directory {os.fspath(path)}: no finished stage in it (no <stage>/{MANIFEST}): "
            "wait for the first stage, or name another run (a notebook: set RLHF_RUN_DIR to artifacts/<run>)"
        )
    try:
        return Run(found, {stage.name: Artifact.load(stage) for stage in finished})
    except UserError as error:
        raise RunError(str(error)) from None


def lineage(run: Run) -> pd.DataFrame:
    """One row per stage: its hash, the stages it was made from with theirs, parameters, wall time and peak memory.

    An input whose hash is no longer that of the stage in this run is marked stale.
    """
    rows = []
    for name, artifact in run.stages.items():
        manifest = artifact.manifest
        seconds = float(manifest["wall_seconds"])
        gpus = manifest["hardware"]["gpus"]
        rows.append(
            {
                "stage": name,
                "hash": artifact.hash[:8],
                "made from": ", ".join(_input(run, *item) for item in manifest["inputs"].items()) or "data alone",
                "wall time": f"{int(seconds) // 60} min {int(seconds) % 60:02d} s",
                "peak memory, GiB": f"{manifest['peak_memory_gib']:.2f}",
                "hardware": f"{len(gpus)} x {gpus[0]}" if gpus else f"{manifest['hardware']['cpus']} CPU cores",
                "seed": manifest["seed"],
            }
        )
    return pd.DataFrame(rows).set_index("stage")


def early_and_late(samples: pd.DataFrame) -> pd.DataFrame:
    """The fixed prompts of PPO's samples.jsonl at the first and the last step that sampled them, side by side.

    Columns have two levels: (prompt), and per step response, score, KL in nats, tokens, and whether it ended by EOS.
    Step 1 is sampled before the first update, so it is the model PPO began with.
    """
    if samples.empty or not (samples["kind"] == "fixed").any():
        return pd.DataFrame()
    fixed = samples[samples["kind"] == "fixed"].copy()
    # A prompt that stands twice among the fixed ones keeps its place.
    fixed["place"] = fixed.groupby(["step", "prompt"]).cumcount()
    first, last = fixed["step"].min(), fixed["step"].max()
    sides = {}
    for step in dict.fromkeys((first, last)):
        side = fixed[fixed["step"] == step].set_index(["prompt", "place"])
        sides[f"step {step}"] = pd.DataFrame(
            {
                "response": side["response"],
                "score": side["score"],
                "KL": side["kl"],
                "tokens": side["length"],
                "EOS": side["has_eos"].map({True: "yes", False: "no"}),
            }
        )
    table = pd.concat(sides, axis=1)
    return table.reset_index(level="place", drop=True).reset_index()


def side_by_side(table: pd.DataFrame) -> Styler:
    """`early_and_late` for people: HTML with escaped text, rounded numbers and wrapped columns."""
    digits = {"score": "{:.2f}", "KL": "{:.1f}"}
    numbers = {column: digits[column[-1]] for column in table.columns if column[-1] in digits}
    texts = [column for column in table.columns if column[-1] == "response" or column[0] == "prompt"]
    # A fixed id, so that the same run gives the same HTML.
    style = table.style.format(numbers, escape="html").hide(axis="index").set_uuid("fixed_prompts")
    style = style.set_properties(**{"vertical-align": "top"})
    style = style.set_properties(subset=texts, **{"text-align": "left", "max-width": "24em", "white-space": "pre-wrap"})
    # "tex2jax_ignore" keeps Jupyter from reading dollars in a sample as formulas.
    return style.set_table_attributes('class="tex2jax_ignore"')


def vital_signs(history: pd.DataFrame) -> pd.DataFrame:
    """PPO's first tenth against its last, each sign beside what is healthy; `look` where the end is not.

    The bounds are for reading a run, not for judging it: they ask for a look at the curve of that name.
    """
    length, entropy = _ends(history, "rollout/response_length"), _ends(history, "objective/entropy")
    objective = _ends(history, "objective/rlhf_reward")
    kl = _ends(history, "objective/kl")
    eos = _ends(history, "rollout/eos_rate")
    variance = _ends(history, "val/explained_variance")
    per_token = entropy[0] / length[0], entropy[1] / length[1]
    signs = [
        ("score minus KL cost, per response", objective, "higher at the end", objective[1] > objective[0]),
        ("KL to the reference, nats per response", kl, "rises, then flattens; never negative", kl[1] >= -0.1),
        ("EOS rate", eos, "0.9 or more", eos[1] >= 0.9),
        ("response length, tokens", length, "between half and twice the start", 0.5 <= length[1] / length[0] <= 2.0),
        ("entropy, nats per token", per_token, "falls, stays above a quarter", per_token[1] >= per_token[0] / 4),
        ("explained variance of the critic", variance, "above 0, towards 1", variance[1] > 0),
    ]
    rows = [
        {
            "sign": name,
            "first tenth": f"{start:.2f}",
            "last tenth": f"{end:.2f}",
            "healthy": healthy,
            "verdict": verdict,
        }
        for name, (start, end), healthy, fine in signs
        for verdict in ["not measured" if math.isnan(end) else "fine" if fine else "look"]
    ]
    return pd.DataFrame(rows).set_index("sign")


def report_table(run: Run) -> str:
    """The Markdown table at the head of the evaluation's report, or a line saying that the run has none."""
    path = run.path / "evaluate" / REPORT_NAME
    if "evaluate" not in run.stages or not path.is_file():
        return "*This run has no `evaluate` stage: `make evaluate` compares its policy with the SFT model.*"
    head = path.read_text(encoding="utf-8").split("\n## ")[0].split("\n![")[0]
    return "\n".join(line for line in head.splitlines() if not line.startswith("# ")).strip()


def report_picture(run: Run) -> Path | None:
    """The evaluation's picture, or None where the run has none."""
    path = run.path / "evaluate" / PICTURE_NAME
    return path if "evaluate" in run.stages and path.is_file() else None


def plot_bargain(run: Run) -> Figure:
    """What PPO got and what it paid: reward, KL, one against the other, length, EOS rate, entropy."""
    history, settings = run.metrics("ppo"), run.settings("ppo")
    entropy = history.assign(per_token=_ratio(history, "objective/entropy", "rollout/response_length"))

    def both(train: str, held_out: str) -> list[tuple[str, str, str]]:
        return [(train, "sampled in training", _TRAIN), (held_out, "held-out prompts", _HELD_OUT)]

    with _figure("What PPO got and what it paid", 2, [1, 1, 1.15]) as (figure, axes):
        scores = both("objective/scores", "eval/scores")
        sources = [key for key in history.columns if key.startswith("objective/scores/")]
        if len(sources) > 1:
            parts = zip(sources, _OTHERS, strict=False)
            scores += [(key, key.removeprefix("objective/scores/"), colour) for key, colour in parts]
        _panel(axes[0], history, scores, "Reward score", "mean score of a response")
        _panel(axes[1], history, both("objective/kl", "eval/kl"), "KL to the reference", "nats per response")
        _level(axes[1], settings.get("kl_target"), "kl_target")
        _level(axes[1], settings.get("max_kl"), "max_kl")
        for name in ("repetition", "refusals", "judge"):
            _alert(axes[0], history, name)
        _alert(axes[1], history, "kl")
        reward_against_kl(axes[2], history)
        axes[2].set_title("Reward against KL")
        if axes[2].get_legend():
            axes[2].legend()
        length = both("rollout/response_length", "eval/response_length")
        _panel(axes[3], history, length, "Response length", "tokens, EOS included", low=0.0)
        _level(axes[3], settings.get("response_length"), "response_length")
        if axes[3].get_legend():
            axes[3].legend()  # placed anew: the level has made room
        _alert(axes[3], history, "length")
        rate = both("rollout/eos_rate", "eval/eos_rate")
        _panel(axes[4], history, rate, "EOS rate", "share of responses", low=0.0, high=1.05, legend="lower right")
        _alert(axes[4], history, "eos_rate")
        _panel(axes[5], entropy, [("per_token", "", _TRAIN)], "Entropy of the policy", "nats per token", low=0.0)
        _alert(axes[5], history, "entropy")
    return figure


def plot_optimiser(run: Run) -> Figure:
    """How the updates went: losses, explained variance, clip fractions, approximate KL, gradient norm."""
    history, settings = run.metrics("ppo"), run.settings("ppo")

    def one(key: str) -> list[tuple[str, str, str]]:
        return [(key, "", _TRAIN)]

    with _figure("How the updates went", 2, [1, 1, 1]) as (figure, axes):
        _panel(axes[0], history, one("loss/policy_avg"), "Policy loss", "per token, whitened advantages")
        _panel(axes[1], history, one("loss/value_avg"), "Value loss", "half mean square, score²", low=0.0)
        variance = one("val/explained_variance")
        _panel(
            axes[2], history, variance, "Explained variance of the critic", "1 - var(error) / var(returns)", high=1.05
        )
        _level(axes[2], 0.0, "no better than the mean")
        fractions = [("policy/clipfrac_avg", "policy", _TRAIN), ("val/clipfrac_avg", "value", _HELD_OUT)]
        _panel(axes[3], history, fractions, "Clip fractions", "share of response tokens", low=0.0)
        _panel(axes[4], history, one("policy/approxkl_avg"), "Approximate KL of an update", "nats per token", low=0.0)
        _level(axes[4], settings.get("target_kl"), "target_kl")
        _panel(axes[5], history, one("policy/grad_norm"), "Gradient norm", "2-norm before clipping", low=0.0)
        _level(axes[5], settings.get("max_grad_norm"), "max_grad_norm")
    return figure


def plot_runs(runs: Sequence[Run]) -> Figure:
    """PPO of several runs in the same panels, a colour each; diamonds are held-out prompts."""
    panels = [
        ("objective/scores", "Reward score", "mean score of a response", None),
        ("objective/kl", "KL to the reference", "nats per response", None),
        ("objective/entropy", "Entropy of the policy", "nats per response", 0.0),
        ("rollout/response_length", "Response length", "tokens, EOS included", 0.0),
        ("rollout/eos_rate", "EOS rate", "share of responses", 0.0),
    ]
    colours = (_TRAIN, _HELD_OUT, *_OTHERS)
    with _figure(f"PPO: {', '.join(run.name for run in runs)}", 2, [1, 1, 1]) as (figure, axes):
        for place, (key, title, unit, low) in zip((0, 1, 3, 4, 5), panels, strict=True):
            held_out = key.replace("objective/", "eval/").replace("rollout/", "eval/")
            curves = [(f"{key} {run.name}", run.name, c) for run, c in zip(runs, itertools.cycle(colours))]
            curves += [(f"{held_out} {run.name}", "", c) for run, c in zip(runs, itertools.cycle(colours))]
            _panel(axes[place], _beside(runs, (key, held_out)), curves, title, unit, low=low)
        axes[2].set_title("Reward against KL")
        axes[2].set_xlabel("KL to the reference, nats per response")
        axes[2].set_ylabel("mean score of a response")
        for run, colour in zip(runs, itertools.cycle(colours)):
            history = run.metrics("ppo")
            if {"objective/kl", "objective/scores"}.issubset(history.columns):
                axes[2].plot(history["objective/kl"], history["objective/scores"], "o-", color=colour, markersize=3)
                axes[2].lines[-1].set_label(run.name)
        if axes[2].lines:
            axes[2].legend(loc="lower right")
    return figure


def _beside(runs: Sequence[Run], keys: Sequence[str]) -> pd.DataFrame:
    """PPO's metrics of all runs in one table by step: columns `<key> <run>`."""
    tables = []
    for run in runs:
        history = run.metrics("ppo")
        if "ppo_step" in history.columns:
            names = {key: f"{key} {run.name}" for key in keys if key in history.columns}
            tables.append(history.set_index("ppo_step")[list(names)].rename(columns=names))
    return pd.concat(tables, axis=1).rename_axis("ppo_step").reset_index() if tables else pd.DataFrame()


def plot_before_ppo(run: Run) -> Figure:
    """What PPO starts from: the SFT loss, the reward model's loss, and its accuracy beside the baselines."""
    sft, reward = logged(run.metrics("sft")), logged(run.metrics("reward"))
    loss = [("loss", "training", _TRAIN), ("eval_loss", "held-out", _HELD_OUT)]
    with _figure("Before PPO: supervised fine-tuning and the reward model", 1, [1, 1, 1.55]) as (figure, axes):
        _panel(axes[0], sft, loss, "SFT loss", "nats per completion token", x="step")
        _panel(axes[1], reward, loss, "Reward model: loss", "nats per pair", x="step")
        _level(axes[1], math.log(2), "a coin, ln 2")
        accuracy = [("accuracy", "training", _TRAIN)]
        _panel(axes[2], reward, accuracy, "Reward model: accuracy", "share of pairs ranked right", x="step")
        _measured_accuracy(axes[2], run.headline("reward"), reward)
    return figure


def _measured_accuracy(axes: Axes, found: dict[str, Any], reward: pd.DataFrame) -> None:
    """Adds what the reward stage measured once, after training, on held-out pairs: the model's accuracy, baselines."""
    if not axes.lines or "accuracy" not in found:
        return
    value = found["accuracy"]
    errors = [[value - found["accuracy_low"]], [found["accuracy_high"] - value]]
    axes.errorbar(
        [float(reward["step"].max())], [value], errors, color=_HELD_OUT, marker="D", markersize=6, capsize=4,
        linestyle="none", label=f"held-out, {value:.2f}\n(bar: 95 % interval)", zorder=4,
    )  # fmt: skip
    baselines = (("accuracy_tfidf", "TF-IDF baseline", "--"), ("accuracy_length_only", "length-only baseline", ":"))
    for (key, label, dash), colour in zip(baselines, _OTHERS, strict=False):
        if key in found:
            text = f"{label}, {found[key]:.2f}"
            axes.axhline(found[key], color=colour, linestyle=dash, linewidth=1.8, label=text)
    axes.set_ylim(min(0.4, axes.get_ylim()[0]), 1.0)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


@contextmanager
def _figure(title: str, rows: int, widths: Sequence[float]) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with a grid of axes, in our style while it is drawn on."""
    # Without pyplot, whose global state would keep every figure alive.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
        figure = Figure(figsize=(12.5, 0.4 + 2.9 * rows), dpi=95, facecolor="white", layout=layout)
        figure.suptitle(title, fontsize=13, fontweight="bold")
        yield figure, list(figure.subplots(rows, len(widths), width_ratios=widths).flat)


def _panel(
    axes: Axes,
    table: pd.DataFrame,
    curves: Sequence[tuple[str, str, str]],
    title: str,
    ylabel: str,
    *,
    x: Literal["ppo_step", "step"] = "ppo_step",
    low: float | None = None,
    high: float | None = None,
    legend: Literal["best", "lower right"] = "best",
) -> None:
    """Draws (key, label, colour) curves over the rows that have them; sparse ones, as evaluations are, as diamonds."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title)
    axes.set_ylabel(ylabel)
    axes.set_xlabel({"ppo_step": "PPO step", "step": "optimizer step"}[x])
    present = [curve for curve in curves if {x, curve[0]}.issubset(table.columns) and table[curve[0]].notna().any()]
    if not present:
        axes.text(0.5, 0.5, "not in this run", transform=axes.transAxes, ha="center", va="center", color=_GREY)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    for key, label, colour in present:
        rows = table[[x, key]].dropna()
        reached = table[table[x] <= rows[x].max()]  # a shorter run is not sparse
        most = max(reached[other].count() for other, _, _ in present)
        _curve(axes, rows[x], rows[key], label, colour, sparse=2 * len(rows) <= most)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    if low is not None and high is None:
        high = low + 1.1 * (max(table[key].max() for key, _, _ in present) - low) or 1.0
    axes.set_ylim(low, high)
    if len(present) > 1:
        axes.legend(loc=legend)


def _curve(axes: Axes, x: pd.Series, y: pd.Series, label: str, colour: str, *, sparse: bool) -> None:
    if sparse:
        axes.plot(
            x, y, color=colour, linewidth=1.0, linestyle="--", marker="D", markersize=5.5, markerfacecolor="white",
            markeredgewidth=1.6, label=label, zorder=3,
        )  # fmt: skip
    elif len(x) >= _SMOOTH_FROM:
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.35)
        smooth = y.rolling(len(x) // 25, center=True, min_periods=1).mean()
        axes.plot(x, smooth, color=colour, linewidth=1.8, label=label)
    else:
        axes.plot(x, y, color=colour, linewidth=1.6, marker="o" if len(x) <= 30 else "", markersize=3, label=label)


def _level(axes: Axes, value: float | None, label: str) -> None:
    """A dotted line at a setting or a known level; none where it is off or the panel is empty."""
    if value is None or not axes.lines:
        return
    low, high = axes.get_ylim()
    axes.axhline(value, color=_GREY, linestyle=":", linewidth=1.3)
    room = 0.12 * (max(high, value) - min(low, value))
    axes.set_ylim(min(low, value), max(high, value + room))
    # On the side where the end of the curve is not.
    below = any(np.asarray(line.get_ydata(), dtype=np.float64)[-1] > value for line in axes.lines[:-1])
    axes.annotate(
        label, (1.0, value), xycoords=("axes fraction", "data"), xytext=(-2, -2 if below else 2),
        textcoords="offset points", ha="right", va="top" if below else "bottom", fontsize=8, color=_GREY,
    )  # fmt: skip


def _alert(axes: Axes, history: pd.DataFrame, name: str) -> None:
    """Shades the steps at which `alerts/<name>` fired, and says which alert it is."""
    key = f"alerts/{name}"
    if not axes.lines or key not in history.columns or not (history[key] == 1).any():
        return
    steps = history.loc[history[key] == 1, "ppo_step"]
    for step in steps:
        axes.axvspan(step - 0.5, step + 0.5, color=_ALARM, alpha=0.15, linewidth=0, zorder=0)
    axes.annotate(
        f"alert: {name}", (float(steps.iloc[0]), 1.0), xycoords=("data", "axes fraction"), xytext=(2, -2),
        textcoords="offset points", ha="left", va="top", fontsize=8, color=_ALARM,
    )  # fmt: skip


def logged(table: pd.DataFrame) -> pd.DataFrame:
    """Rows without the Trainer's last one, whose means cover only the few batches since the row before."""
    return table[table["train_loss"].isna()] if "train_loss" in table.columns else table


def _ratio(table: pd.DataFrame, top: str, bottom: str) -> pd.Series | float:
    return table[top] / table[bottom] if {top, bottom}.issubset(table.columns) else math.nan


def _ends(table: pd.DataFrame, key: str) -> tuple[float, float]:
    """Mean of the first and of the last tenth of a column, at least one row each; NaN where it is missing."""
    values = table[key].dropna() if key in table.columns else pd.Series(dtype=float)
    if values.empty:
        return math.nan, math.nan
    count = max(1, len(values) // 10)
    return float(values.iloc[:count].mean()), float(values.iloc[-count:].mean())


def _input(run: Run, name: str, digest: str) -> str:
    stale = name in run.stages and run.stages[name].hash != digest
    return f"{name} {digest[:8]}" + (" (stale)" if stale else "")
