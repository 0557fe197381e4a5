"""report.html: the report on a reward model as one file that needs nothing else, offline."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from rlhf.reward import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERDICTS = {
    "pass": "Nothing in this report speaks against training a policy on it.",
    "warn": "It can be used; read the warnings first.",
    "fail": "Not good enough to train a policy on. `make ppo` refuses it unless `ppo.ignore_reward_gate=true`.",
}
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif;
  color: #1b1b1b; background: #f6f6f4; margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; margin: .4rem 0 0; } h2 { font-size: 1.2rem; margin: 1rem 0 .3rem; }
p { margin: .4rem 0 .8rem; max-width: 48rem; } .meta { color: #555; }
section, .verdict { background: #fff; border: 1px solid #ddd; border-radius: 8px;
  padding: .2rem 1.2rem 1rem; margin: 1rem 0; }
.verdict { border-left: 10px solid; padding: .8rem 1.2rem; font-size: 1.05rem; }
.verdict.pass { border-left-color: #00875a; } .verdict.warn { border-left-color: #c77700; }
.verdict.fail { border-left-color: #b00020; }
.verdict b { text-transform: uppercase; letter-spacing: .05em; margin-right: .6rem; }
.numbers { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.numbers div { background: #fff; border: 1px solid #ddd; border-radius: 8px; padding: .5rem .9rem; }
.numbers strong { display: block; font-size: 1.25rem; } .numbers span { color: #555; font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th { text-align: left; border-bottom: 2px solid #bbb; padding: .3rem .5rem; vertical-align: bottom; }
td { border-bottom: 1px solid #eee; padding: .3rem .5rem; vertical-align: top; white-space: pre-line; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { text-align: right; }
td.text { min-width: 14rem; overflow-wrap: anywhere; }
.tag { display: inline-block; border-radius: 4px; padding: 0 .45rem; color: #fff; font-size: .8rem; font-weight: 600; }
.tag.pass { background: #00875a; } .tag.warn { background: #c77700; } .tag.fail { background: #b00020; }
svg { max-width: 100%; height: auto; display: block; margin: .5rem 0; }
details summary { cursor: pointer; color: #0b57a0; margin: .4rem 0; }
"""
NUMBERS = ("pairs", "accuracy", "95 % interval", "TF-IDF", "length-only", "answers", "gain, std", "gained", "n",
           "worse answer wins", "before the edit", "pairs that differ", "correlation with the score",
           "model prefers more", "labels prefer more", "difference", "its score", "that score",
           "longer answer is better", "left out, too long")  # fmt: skip


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the page; the same report gives the same bytes."""
    path.write_text(page(report), encoding="utf-8")


def page(report: Mapping[str, Any]) -> str:
    """The whole page as HTML."""
    verdict, title = report["gate"]["verdict"], f"Reward model of {report['run']}"
    parts = [
        f"<p class=meta>recipe {_text(report['recipe'])} · trained on {report['train_pairs']:,} pairs of "
        f"{_text(report['data'])} · measured on {report['pairs']:,} held-out ones · seed {report['seed']}</p>",
        f"<div class='verdict {verdict}'><b>{verdict}</b>{_text(VERDICTS[verdict])}</div>",
        _headline(report),
        *_sections(report),
    ]
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{_text(title)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{_text(title)}</h1>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def _headline(report: Mapping[str, Any]) -> str:
    found, shorter, curve = report["accuracy"], report["shorter"], report["calibration"]
    numbers = [
        (
            figures.percent(found["value"]),
            f"accuracy, {figures.percent(found['low'])} to {figures.percent(found['high'])}",
        ),
        *((figures.percent(item["value"]), f"{name} baseline") for name, item in report["baselines"].items()),
        (f"{curve['ece']:.3f}", "calibration error"),
    ]
    if shorter is not None:
        numbers.insert(1, (figures.percent(shorter["value"]), "where the shorter answer is better"))
    cells = "".join(f"<div><strong>{_text(value)}</strong><span>{_text(name)}</span></div>" for value, name in numbers)
    return f"<div class=numbers>{cells}</div>"


def _sections(report: Mapping[str, Any]) -> list[str]:
    curve = report["calibration"]
    sections = [
        _section(
            "The gate",
            "Each check with its numbers. A bound that the whole 95 % interval misses fails; one that the value misses "
            "within its interval warns. Thresholds: reward.gate in the recipe.",
            _table(figures.checks_table(report)),
        ),
        _section(
            "Accuracy",
            "A model that is no better than the baselines has learned no more than they have: length-only prefers the "
            "longer (or shorter) answer, TF-IDF weighs words. “Better answer: shorter” asks what is left where length "
            "does not help.",
            _svg(figures.plot_slices(report)) + _folded("numbers", _table(figures.accuracy_frame(report))),
        ),
        _section(
            "Calibration and margins",
            f"Under Bradley-Terry a margin of m means that the answer is better with probability sigmoid(m). Below the "
            f"dotted line the model is too sure. Negative log-likelihood {curve['nll']:.3f} nats per pair (a coin: "
            f"{figures.coin_nll():.3f}); divided by the best temperature, {curve['nll_after']:.3f} and an error of "
            f"{curve['ece_after']:.3f}.",
            _svg(figures.plot_calibration(report)),
        ),
        _section(
            "Scores, length and form",
            "“Model prefers more” is the share of pairs in which the answer with more of a feature wins; that of the "
            "labels stands beside it. A difference far from 0 is a taste of the model's own, which PPO will follow.",
            _svg(figures.plot_scores(report)) + _table(figures.bias_frame(report)),
        ),
        _section(
            "Edited answers",
            "The same held-out answers, made no better, or worse. “Worse answer wins” is the share of pairs in which "
            "the edited worse answer beats the better one as it was.",
            _svg(figures.plot_edits(report)) + _table(figures.edits_frame(report)),
        ),
        _section(
            "What must not matter",
            "Padding and batch size are no part of an answer, and another wording of the prompt should hardly matter.",
            _table(figures.invariance_frame(report)),
        ),
    ]
    if report["ood"]:
        text = "Preference sets from elsewhere: where the policy may go, but the labels do not."
        sections.append(_section("Out of distribution", text, _table(figures.ood_frame(report))))
    if report["learning_curve"]:
        text = (
            "A linear reward on the frozen features of the SFT model, trained on parts of the labels. While it rises, "
            "more labels help; where it is flat, look for better ones, or for a better base."
        )
        sections.append(_section("Learning curve", text, _svg(figures.plot_learning_curve(report))))
    if report["failures"]:
        text = "Those it is surest of are often wrong labels; the nearly right ones show what it cannot tell apart."
        sections.append(_section("Failures", text, _table(figures.failures_frame(report))))
    return sections


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2><p>{_text(text)}</p>{body}</section>"


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{body}</details>"


def _table(frame: pd.DataFrame) -> str:
    kinds = {name: "number" if name in NUMBERS else "text" if name in _TEXTS else "" for name in frame.columns}
    head = "".join(f"<th class='{kinds[name]}'>{_text(name)}</th>" for name in frame.columns)
    rows = []
    for _, row in frame.iterrows():
        cells = [f"<td class='{kinds[name]}'>{_cell(name, row[name])}</td>" for name in frame.columns]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


_TEXTS = ("prompt", "better by label", "worse by label", "reason")


def _cell(name: str, value: Any) -> str:
    return f"<span class='tag {value}'>{value}</span>" if name == "verdict" else _text(value)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element, its text in the reader's font; dates and random ids would make reports differ."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "rlhf", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
