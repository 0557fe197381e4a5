"""Responses side by side as HTML: the same prompts at several PPO steps, and by the policies of the evaluation.

All of it is plain HTML that reads without scripts; page.js filters, sorts and colours it. Every text is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.evaluation._panels import display_name
from rlhf.evaluation.curves import Run
from rlhf.evaluation.report import headline_judge
from rlhf.evaluation.runs import comparison_of
from rlhf.reward.page import escaped

MOST_STEPS = 6  # of PPO in the page: first, published, last and some between
MOST_CHARACTERS = 1_200_000  # of HTML per group: the page stays below 5 MB
HEATS = (("token_reward", "reward"), ("token_kl", "KL"), ("token_value", "value"))
ORDERS = (
    *(("", "as sampled"), ("gain", "gain, largest first"), ("loss", "loss, largest first")),
    *(("high", "score, highest first"), ("low", "score, lowest first"), ("kl", "KL, highest first")),
)
NO_TOKENS = (
    "samples.jsonl of this run has no numbers per token (it was written by an earlier version): `make ppo FORCE=1` "
    "records them."
)


@dataclass
class Side:
    """One response to a prompt: `row` as in samples.jsonl, with a single `score`."""

    label: str
    row: Mapping[str, Any]


@dataclass
class Group:
    """Prompts with the responses of the same sides.

    Attributes:
        name: of the group in the page.
        score: what the score is called.
        labels: of the sides, the earliest or the baseline first.
        pairs: (prompt, its sides) in order.
    """

    name: str
    score: str
    labels: list[str]
    pairs: list[tuple[str, list[Side]]]


def groups(run: Run) -> list[Group]:
    """What there is to compare in a run."""
    return [group for group in (training_group(run), evaluation_group(run)) if group is not None]


def training_group(run: Run) -> Group | None:
    """The fixed prompts of PPO's samples.jsonl at the first, the published, the last and some other steps."""
    table = run.samples("ppo")
    if "kind" not in table.columns or not (table["kind"] == "fixed").any():
        return None
    fixed = table[table["kind"] == "fixed"]
    steps = chosen_steps(sorted({int(step) for step in fixed["step"]}), run.headline("ppo").get("published_ppo_step"))
    labels = {step: f"step {step}" + (" (SFT)" if step == 0 else "") for step in steps}
    return _group("PPO, step by step", "score", fixed.to_dict("records"), "step", labels)


def chosen_steps(steps: Sequence[int], published: int | None) -> list[int]:
    """At most MOST_STEPS of the steps: the first, the last, the published one, the rest evenly between."""
    if len(steps) <= MOST_STEPS:
        return list(steps)
    between = MOST_STEPS - (2 if published in (steps[0], steps[-1], None) or published not in steps else 3)
    last = len(steps) - 1
    kept = {steps[round(number * last / (between + 1))] for number in range(between + 2)}
    return sorted(kept | {step for step in steps if step == published})


def evaluation_group(run: Run) -> Group | None:
    """The responses of the evaluation's policies to held-out prompts."""
    result, table = comparison_of(run), run.samples("evaluate")
    if result is None or table.empty:
        return None
    judge = headline_judge(result)
    rows = [row | {"score": row["scores"][judge]} for row in table.to_dict("records")]
    labels = {name: display_name(name) for name in result["policies"]}
    return _group("evaluation, held-out prompts", judge, rows, "policy", labels)


def _group(name: str, score: str, rows: list[dict[Any, Any]], by: str, labels: dict[Any, str]) -> Group:
    """Rows of the same prompt in the same place; a prompt that stands twice keeps its places."""
    places: dict[tuple[str, int], list[Side]] = {}
    seen: dict[tuple[Any, str], int] = {}
    for row in rows:
        if row[by] in labels:
            place = seen.get((row[by], row["prompt"]), 0)
            seen[row[by], row["prompt"]] = place + 1
            places.setdefault((row["prompt"], place), []).append(Side(labels[row[by]], row))
    pairs = [(prompt, sides) for (prompt, _), sides in places.items()]
    return Group(name, score, list(labels.values()), pairs)


def samples_html(run: Run) -> str:
    """The whole part: controls, then one list per group. Empty where the run has no samples."""
    found = groups(run)
    if not found:
        return ""
    parts = [_controls(found)]
    for number, group in enumerate(found):
        articles: list[str] = []
        length = 0
        for article in _articles(group):
            length += len(article)
            if articles and length > MOST_CHARACTERS:
                break
            articles.append(article)
        note = "" if len(articles) == len(group.pairs) else f"The first {len(articles)} of {len(group.pairs)} prompts."
        if number == 0 and group.name.startswith("PPO") and not _has_tokens(group):
            note = f"{note} {NO_TOKENS}".strip()
        parts.append(
            f"<div class='group' data-group='{number}' data-score='{escaped(group.score)}' "
            f"data-labels='{escaped(json.dumps(group.labels))}'>"
            f"{f'<p class=meta>{escaped(note)}</p>' if note else ''}<div class='list'>{''.join(articles)}</div></div>"
        )
    return "".join(parts)


def _has_tokens(group: Group) -> bool:
    return any(_tokens(side.row) for _, sides in group.pairs for side in sides)


def _controls(found: Sequence[Group]) -> str:
    choices = "".join(f"<option value='{n}'>{escaped(group.name)}</option>" for n, group in enumerate(found))
    heats = "".join(f"<button type='button' data-heat='{key}'>{name}</button>" for key, name in HEATS)
    order = "".join(f"<option value='{value}'>{text}</option>" for value, text in ORDERS)
    return (
        "<div class='controls' hidden>"
        f"<label>what <select id='group'>{choices}</select></label>"
        "<label>left <select id='left'></select></label><label>right <select id='right'></select></label>"
        f"<label>order <select id='order'>{order}</select></label>"
        "<label class='wide'>search <input id='search' type='search' placeholder='in prompts and responses'></label>"
        "<label><span id='score-name'>score</span> of the right, from "
        "<input id='least' type='number' step='0.1'></label>"
        "<label>to <input id='most' type='number' step='0.1'></label>"
        "<span class='heat' role='group'>colour tokens by "
        f"<button type='button' data-heat=''>none</button>{heats}</span>"
        "<span id='scale'></span><span id='count' role='status'></span></div>"
    )


def _articles(group: Group) -> Iterator[str]:
    for prompt, sides in group.pairs:
        shown = "".join(_side(side, group.score) for side in sides)
        yield f"<article><p class='prompt'>{escaped(prompt)}</p><div class='sides'>{shown}</div></article>"


def _side(side: Side, score_name: str) -> str:
    row = side.row
    numbers = [f"{score_name} {_short(row['score'], '+.2f')}"]
    if row.get("kl") is not None and not _missing(row["kl"]):
        numbers.append(f"KL {_short(row['kl'], '.1f')}")
    numbers.append(f"{row['length']} tokens")
    ended = "<span class='tag pass'>EOS</span>" if row["has_eos"] else "<span class='tag warn'>cut off</span>"
    others = {name: value for name, value in (row.get("scores") or {}).items() if name != score_name}
    more = " · ".join(f"{name} {_short(value, '+.2f')}" for name, value in others.items())
    values = "".join(
        f" data-{name.replace('_', '-')}='{escaped(json.dumps(row[name], separators=(',', ':')))}'"
        for name, _ in HEATS
        if _tokens(row) and isinstance(row.get(name), list)
    )
    return (
        f"<div class='side' data-label='{escaped(side.label)}' data-score='{_plain(row['score'])}' "
        f"data-kl='{_plain(row.get('kl'))}'>"
        f"<header><b>{escaped(side.label)}</b> {escaped(' · '.join(numbers))} {ended}"
        f"{f'<small>{escaped(more)}</small>' if more else ''}</header>"
        f"<p class='response'{values}>{_response(row)}</p></div>"
    )


def _tokens(row: Mapping[str, Any]) -> list[str]:
    """The texts of the tokens; none where the file is older than they are."""
    tokens = row.get("tokens")
    return tokens if isinstance(tokens, list) else []


def _response(row: Mapping[str, Any]) -> str:
    tokens = _tokens(row)
    if not tokens:
        return escaped(row["response"])
    last = len(tokens) - 1
    return "".join(
        f"<i>{escaped(text)}</i>" if text else f"<i class=end>{'EOS' if n == last and row['has_eos'] else '·'}</i>"
        for n, text in enumerate(tokens)
    )


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _short(value: Any, form: str) -> str:
    return "none" if _missing(value) else format(value, form)


def _plain(value: Any) -> str:
    return "" if _missing(value) else f"{value:.6g}"
