"""report.html: the report on a reward model as one file that needs nothing else, offline."""

from __future__ import annotations

import html
import io
from collections.abc import Collection, Mapping, Sequence
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
           "longer answer is better", "left out, too long", "beats the own answer")  # fmt: skip


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the page; the same report gives the same bytes."""
    path.write_text(page(report), encoding="utf-8")


def page(report: Mapping[str, Any]) -> str:
    """The whole page as HTML."""
    verdict, title = report["gate"]["verdict"], f"Reward model of {report['run']}"
    parts = [
        f"<p class=meta>recipe {escaped(report['recipe'])} · trained on {report['train_pairs']:,} pairs of "
        f"{escaped(report['data'])} · measured on {report['pairs']:,} held-out ones · seed {report['seed']}</p>",
        f"<div class='verdict {verdict}'><b>{verdict}</b>{escaped(VERDICTS[verdict])}</div>",
        headline(report),
        *(section(*parts) for parts in sections(report)),
    ]
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{escaped(title)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escaped(title)}</h1>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def headline(report: Mapping[str, Any]) -> str:
    """The numbers that one looks for first, as a row of boxes."""
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
    return boxes(numbers)


def boxes(numbers: Sequence[tuple[str, str]]) -> str:
    """(value, what it is) as a row of boxes."""
    cells = [f"<div><strong>{escaped(value)}</strong><span>{escaped(name)}</span></div>" for value, name in numbers]
    return f"<div class=numbers>{''.join(cells)}</div>"


def sections(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Title, explanation (text) and body (HTML) of each part of the page that there is something to say in."""
    curve = report["calibration"]
    found = [
        (
            "The gate",
            "Each check with its numbers. A bound that the whole 95 % interval misses fails; one that the value misses "
            "within its interval warns. Thresholds: reward.gate in the recipe.",
            table(figures.checks_table(report)),
        ),
        (
            "Accuracy",
            "A model that is no better than the baselines has learned no more than they have: length-only prefers the "
            "longer (or shorter) answer in characters (slices by length count tokens), TF-IDF weighs words. “Better "
            "answer: shorter” asks what is left where length does not help.",
            svg(figures.plot_slices(report)) + folded("numbers", table(figures.accuracy_frame(report))),
        ),
        (
            "Calibration and margins",
            f"Under Bradley-Terry a margin of m means that the answer is better with probability sigmoid(m). Below the "
            f"dotted line the model is too sure. Negative log-likelihood {curve['nll']:.3f} nats per pair (a coin: "
            f"{figures.coin_nll():.3f}); divided by the best temperature, {curve['nll_after']:.3f} and an error of "
            f"{curve['ece_after']:.3f}.",
            svg(figures.plot_calibration(report)),
        ),
        (
            "Scores, length and form",
            "“Model prefers more” is the share of pairs in which the answer with more of a feature wins; that of the "
            "labels stands beside it. A difference far from 0 is a taste of the model's own, which PPO will follow.",
            svg(figures.plot_scores(report)) + table(figures.bias_frame(report)),
        ),
        (
            "Edited answers",
            "The same held-out answers, made no better, or worse. “Worse answer wins” is the share of pairs in which "
            "the edited worse answer beats the better one as it was.",
            svg(figures.plot_edits(report)) + table(figures.edits_frame(report)),
        ),
        (
            "What must not matter",
            "Padding and batch size are no part of an answer, and another wording of the prompt should hardly matter.",
            table(figures.invariance_frame(report)),
        ),
    ]
    return found + _where_measured(report)


def _where_measured(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The sections that not every report has."""
    found = []
    if report.get("relevance"):
        text = (
            "The better answer to one prompt, given to another. A model that does not mind hardly reads the prompt, "
            "and PPO ends with one answer for all. The last row is the answer that wins in most places, with its text."
        )
        found.append(("Answers to other prompts", text, table(figures.relevance_frame(report))))
    if report["ood"]:
        text = "Preference sets from elsewhere: where the policy may go, but the labels do not."
        found.append(("Out of distribution", text, table(figures.ood_frame(report))))
    if report["learning_curve"]:
        text = (
            "A linear reward on the frozen features of the SFT model, trained on parts of the labels. While it rises, "
            "more labels help; where it is flat, look for better ones, or for a better base."
        )
        found.append(("Learning curve", text, svg(figures.plot_learning_curve(report))))
    if report["failures"]:
        text = "Those it is surest of are often wrong labels; the nearly right ones show what it cannot tell apart."
        found.append(("Failures", text, table(figures.failures_frame(report))))
    return found


def section(title: str, text: str, body: str) -> str:
    """A part of a page: text is escaped, the body is HTML."""
    return f"<section><h2>{escaped(title)}</h2><p>{escaped(text)}</p>{body}</section>"


def folded(title: str, body: str) -> str:
    """HTML behind a line that one clicks on."""
    return f"<details><summary>{escaped(title)}</summary>{body}</details>"


def table(frame: pd.DataFrame, numbers: Collection[str] = NUMBERS) -> str:
    """A table as HTML, all of its cells escaped; the columns `numbers` stand to the right."""
    kinds = {name: "number" if name in numbers else "text" if name in _TEXTS else "" for name in frame.columns}
    head = "".join(f"<th class='{kinds[name]}'>{escaped(name)}</th>" for name in frame.columns)
    rows = []
    for _, row in frame.iterrows():
        cells = [f"<td class='{kinds[name]}'>{_cell(name, row[name])}</td>" for name in frame.columns]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


_TEXTS = ("prompt", "better by label", "worse by label", "reason")


def _cell(name: str, value: Any) -> str:
    text = escaped(value)
    return f"<span class='tag {text}'>{text}</span>" if name == "verdict" else text


def escaped(value: Any) -> str:
    """Anything as text that HTML shows as it is."""
    return html.escape(str(value))


def svg(figure: Figure) -> str:
    """The figure as an <svg> element, its text in the reader's font; dates and random ids would make reports differ."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "rlhf", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
