"""The report a person reads after a run: one table, one picture, a few samples side by side."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.errors import UserError
from rlhf.evaluation import _panels, frontier_report
from rlhf.evaluation._panels import display_name
from rlhf.evaluation.compare import PolicySamples

if TYPE_CHECKING:
    import pandas as pd

PICTURE_NAME = "comparison.png"
REPORT_NAME = "report.md"
NUM_SAMPLES = 8

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$<>&])")


def comparison_table(result: Mapping[str, Any]) -> str:
    """Markdown table of `compare`'s result, aligned so that it reads well in a terminal: `comparison_rows`."""
    return _aligned(comparison_rows(result))


def comparison_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows of `compare`'s result: one row per measure.

    There is a column per policy, and with two policies one with the change. Brackets hold 95 % bootstrap intervals over
    prompts.
    """
    metrics = result["metrics"]
    first, *others = result["policies"]
    change = len(others) == 1  # with more policies the table would be too wide for a terminal
    header = ["measure", *map(display_name, result["policies"]), *(["change"] if change else [])]
    rows = []
    for label, key, delta, digits in _table_measures(result["scores"]):
        row = [label, *(with_interval(metrics, f"{name}/{key}", digits) for name in result["policies"])]
        rows.append(
            row + [with_interval(metrics, f"{name}_vs_{first}/{delta}", digits, "+") for name in others[:change]]
        )
    for label, key, ratio, digits in _SET_MEASURES:
        row = [label, *(with_interval(metrics, f"{name}/{key}", digits) for name in result["policies"])]
        ratios = [metrics.get(f"{name}_vs_{first}/{ratio}") for name in others[:change]]
        rows.append(row + ["-" if value is None else f"x {value:.2f}" for value in ratios])
    base = display_name(first)
    for label, key in ((f"win rate over {base} by", "win_rate"), ("the same at equal length, by", "lc_win_rate")):
        for score in [*result["scores"], *([result["pairwise"]["name"]] if "pairwise" in result else [])]:
            keys = [f"{name}_vs_{first}/{key}_{score}" for name in others]
            row = [f"{label} {score}", "-", *(with_interval(metrics, key, 3) for key in keys)]
            rows.append(row + ["-"] * change)
    for label, key in (("same verdict in both orders,", "order_agreement"), ("replies without a verdict,", "unread")):
        for score in [result["pairwise"]["name"]] if "pairwise" in result else []:
            keys = [f"{name}_vs_{first}/{key}_{score}" for name in others]
            rows.append([f"{label} {score}", "-", *(with_interval(metrics, key, 3) for key in keys), *["-"] * change])
    for score in result["scores"] if not change else ():
        keys = [f"{name}/strength_{score}" for name in result["policies"]]
        rows.append([f"Bradley-Terry by {score}, logits", *(with_interval(metrics, key, 2, "+") for key in keys)])
    empty = {"-"}
    return [header, *(row for row in rows if set(row[1:]) != empty)]


def part_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows of `compare_parts`, one row per part of a mixture; nothing where the prompts are of one part.

    A mean over all prompts hides a policy that answers one kind of them in the way of another, such as by refusing.
    """
    parts, (first, *others) = result.get("parts", ()), result["policies"]
    if not parts:
        return []
    columns = [(f"refusals, {display_name(name)}", f"{name}/refusal_rate", 3) for name in result["policies"]]
    columns += [(f"tokens, {display_name(name)}", f"{name}/length_mean", 0) for name in result["policies"]]
    for name in others:
        who = f", {display_name(name)}" if len(others) > 1 else ""
        columns += [(f"wins by {score}{who}", f"{name}_vs_{first}/win_rate_{score}", 3) for score in result["scores"]]
    header = ["prompts of", "responses", *(label for label, _, _ in columns)]
    return [
        header,
        *(
            [part["part"], f"{part['num_responses']:,}"]
            + [with_interval(part["metrics"], key, digits) for _, key, digits in columns]
            for part in parts
        ),
    ]


def part_table(result: Mapping[str, Any]) -> str:
    """Markdown of `part_rows`; empty where there are none."""
    rows = part_rows(result)
    return _aligned(rows) if rows else ""


def plot_comparison(
    result: Mapping[str, Any],
    samples: Sequence[PolicySamples],
    history: pd.DataFrame | None,
    path: str | os.PathLike[str],
    *,
    judge: str | None = None,
) -> Path:
    """Draws "what PPO changed" into one PNG.

    Left, the judge's scores of all responses by policy; middle, what the KL bought during PPO; right, win rate with
    its interval, length, EOS rate and distinct-2.

    Args:
        result: from `compare`.
        samples: what `compare` was given.
        history: PPO's metrics, one row per step, with `ppo_step`, `objective/kl` and `objective/scores`, and where
            there were evaluations `eval/kl` and `eval/scores` (rows without one hold NaN). None, or a table without
            these columns, leaves the panel empty with a note.
        path: of the PNG; its folder must exist.
        judge: score of the left panel and the win rate; None means `judge` where there is one, else the last score.

    Raises:
        UserError: `judge` is not among the scores, or there are none.
    """
    # The object API with its own canvas: pyplot's global state would choose a backend and leak figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    judge = main_judge(result["scores"], judge)
    figure = Figure(figsize=(14.5, 4.9), dpi=130, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.06, wspace=0.02)
    FigureCanvasAgg(figure)
    outer = figure.add_gridspec(1, 3, width_ratios=[1.05, 1.0, 1.0])
    _panels.score_histograms(figure.add_subplot(outer[0]), samples, judge)
    _panels.reward_against_kl(figure.add_subplot(outer[1]), history)
    _panels.summary_bars(figure, outer[2], result, judge)
    names = [display_name(name) for name in result["policies"]]
    figure.suptitle(
        f"What {' and '.join(names[1:])} changed against {names[0]}  ({result['num_prompts']:,} held-out prompts)",
        fontsize=14,
        fontweight="bold",
    )
    figure.savefig(path, metadata={"Software": None})
    return Path(path)


def write_report(
    directory: str | os.PathLike[str],
    result: Mapping[str, Any],
    samples: Sequence[PolicySamples],
    history: pd.DataFrame | None = None,
    *,
    judge: str | None = None,
    seed: int = 0,
) -> Path:
    """Writes `report.md` and `comparison.png` into a directory, which is made if need be.

    Args:
        directory: where to write.
        result, samples, history, judge: as for `plot_comparison`.
        seed: of the choice of random samples.

    Returns:
        The path of `report.md`.

    Raises:
        UserError: as `plot_comparison`.
    """
    judge = main_judge(result["scores"], judge)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plot_comparison(result, samples, history, directory / PICTURE_NAME, judge=judge)
    first, last = display_name(result["policies"][0]), display_name(result["policies"][-1])
    others = " and ".join(map(display_name, result["policies"][1:]))
    text = "\n".join(
        [
            f"# {others} against {first}",
            "",
            f"{result['num_responses']:,} responses to {result['num_prompts']:,} held-out prompts{sampled(result)}. "
            "Brackets hold 95 % bootstrap intervals over prompts; a tie counts as half a win.",
            "",
            comparison_table(result),
            "",
            *([part_table(result), ""] if part_rows(result) else []),
            f"![What {others} changed against {first}]({PICTURE_NAME})",
            "",
            *_frontier_section(result, directory),
            "## Samples",
            "",
            f"The two prompts on which {last} gains most by `{judge}`, the two on which it loses most, and some "
            "drawn at random.",
            "",
            *_sample_table(samples[0], samples[-1], judge, seed),
            "",
        ]
    )
    path = directory / REPORT_NAME
    path.write_text(text, encoding="utf-8")
    return path


def sampled(result: Mapping[str, Any]) -> str:
    """`, sampled at temperature 0.7, top-p 1, ...`; nothing where it was not recorded."""
    knobs = result.get("sampling")
    if not knobs:
        return ""
    penalty = f", repetition penalty {knobs['repetition_penalty']:g}" if knobs["repetition_penalty"] != 1 else ""
    as_sampled = "; KL is that of the policies with these knobs to the SFT model without them"
    return (
        f", sampled at temperature {knobs['temperature']:g}, top-p {knobs['top_p']:g}{penalty}, "
        f"at most {knobs['response_length']} tokens{as_sampled if knobs.get('kl_as_sampled') else ''}"
    )


def _frontier_section(result: Mapping[str, Any], directory: Path) -> list[str]:
    """The part on reward against KL, and its picture in `directory`; nothing where it was not measured."""
    if "frontier" not in result:
        return []
    curve = result["frontier"]
    frontier_report.plot_frontier(curve, directory / frontier_report.PICTURE_NAME)
    return [
        "## Reward against KL",
        "",
        _drawn(curve),
        "",
        _aligned(frontier_report.table_rows(curve)),
        "",
        f"![Reward against the KL paid for it]({frontier_report.PICTURE_NAME})",
        "",
        *[line for sentence in frontier_report.sentences(curve) for line in (sentence, "")],
    ]


def _drawn(curve: Mapping[str, Any]) -> str:
    if curve["samples"] == 1:
        return f"One response of the SFT model and of each PPO policy to each of {curve['prompts']} prompts."
    return (
        f"{curve['samples']} samples of the SFT model to each of {curve['prompts']} prompts, of which best-of-n keeps "
        f"the one with most {curve['trained']}, a missing EOS counted as PPO does; one response of each PPO policy to "
        "the same prompts."
    )


def pick_samples(before: Sequence[float], after: Sequence[float], seed: int = 0) -> list[tuple[int, str]]:
    """Indices of up to eight responses to show, each once, with the reason: best, worst or random.

    Args:
        before: [N] judge scores of the baseline.
        after: [N] judge scores of the policy on the same prompts.
        seed: of the random ones.

    Returns:
        The two largest gains (largest first), the two largest losses (largest first), and random others.
    """
    gains = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    ascending = np.argsort(gains, kind="stable").tolist()
    best = ascending[::-1][:2]
    worst = [index for index in ascending if index not in best][:2]
    rest = [index for index in range(len(gains)) if index not in {*best, *worst}]
    random = np.random.default_rng(seed).permutation(rest)[: NUM_SAMPLES - len(best) - len(worst)].tolist()
    reasons = [("best", best), ("worst", worst), ("random", random)]
    return [(int(index), reason) for reason, indices in reasons for index in indices]


def escape_markdown(text: str) -> str:
    """Makes a model's text show as it is inside a table cell: no markup, no new cells, line breaks kept."""
    escaped = _MARKDOWN_SPECIAL.sub(r"\\\1", text)
    return "<br>".join(escaped.splitlines())


def main_judge(scores: Sequence[str], judge: str | None = None) -> str:
    """The score that picture and samples go by: the one asked for, else `judge`, else the last.

    Raises:
        UserError: no scores, or the one asked for is not among them.
    """
    if judge is None and scores:
        return "judge" if "judge" in scores else scores[-1]
    if judge is None or judge not in scores:
        raise UserError(f"report: judge {judge!r} is not among the scores {list(scores)}; name one of them")
    return judge


def headline_judge(result: Mapping[str, Any]) -> str:
    """The score of a stored comparison that boxes, samples and headline numbers go by: the recipe's first judge.

    An evaluation from before `headline` was stored has the choice of `main_judge`.
    """
    return main_judge(result["scores"], result.get("headline"))


def _table_measures(scores: Sequence[str]) -> list[tuple[str, str, str, int]]:
    """(label, metric key, key of the change, digits) of the averaged measures, in the table's order."""
    rows = [(f"{score}, mean", f"{score}_mean", f"{score}_delta", 3) for score in scores]
    return [
        *rows,
        ("rlhf_reward, what PPO maximises", "rlhf_reward_mean", "rlhf_reward_delta", 3),
        ("KL to reference, nats per response", "kl_mean", "kl_delta", 2),
        ("length, tokens", "length_mean", "length_delta", 1),
        ("EOS rate", "eos_rate", "eos_rate_delta", 3),
        ("refusal rate", "refusal_rate", "refusal_rate_delta", 3),
    ]


# (label, metric key, key of the ratio, digits) of what is one number of all responses
_SET_MEASURES = (
    ("distinct-2", "distinct_2", "distinct_2_ratio", 3),
    ("self-BLEU", "self_bleu", "", 3),
    ("repetition-4", "repetition_4", "", 3),
    ("perplexity of held-out text", "perplexity", "perplexity_ratio", 2),
)


def with_interval(metrics: Mapping[str, float], key: str, digits: int, sign: str = "") -> str:
    """A metric for people, its `_low` and `_high` in brackets where they are there; `-` where it is not."""
    if key not in metrics:  # the KL of a model with another tokenizer
        return "-"
    value, low, high = (metrics.get(key + suffix, metrics[key]) for suffix in ("", "_low", "_high"))
    # "z": a change that rounds to nothing reads 0.000, not -0.000.
    shown = [f"{number:{sign}z.{digits}f}" for number in (value, low, high)]
    return shown[0] if low == high else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _sample_table(baseline: PolicySamples, policy: PolicySamples, judge: str, seed: int) -> list[str]:
    before, after = baseline.scores[judge], policy.scores[judge]
    first, last = display_name(baseline.name), display_name(policy.name)
    lines = [f"| | prompt | {first} | {last} | {judge}: {first} -> {last} |", "|---|---|---|---|---|"]
    for index, reason in pick_samples(before, after, seed):
        texts = [baseline.prompts[index], baseline.responses[index], policy.responses[index]]
        cells = " | ".join(escape_markdown(text) for text in texts)
        lines.append(f"| {reason} | {cells} | {before[index]:.2f} -> {after[index]:.2f} |")
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Markdown table, first column to the left and numbers to the right, padded to equal widths."""
    widths = [max(3, *(_width(row[column]) for row in rows)) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + gaps[0], *(gap + cell for cell, gap in zip(row[1:], gaps[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])])


def _width(text: str) -> int:
    """Columns that a text takes in a terminal: East Asian wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
