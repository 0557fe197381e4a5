"""What moves a score that should not: edits of an answer, padding, batch size, another wording of the prompt.

And what should and may not: the prompt itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.data import Prompt, Renderer
from rlhf.errors import UserError
from rlhf.evaluation.statistics import bootstrap_interval, wilson_interval
from rlhf.evaluation.text_metrics import cjk_share, tokenize
from rlhf.ppo.generation.plain import left_pad
from rlhf.reward.slices import correct
from rlhf.sampling import score_sequences

Row = Mapping[str, Any]

CJK_SHARE = 0.3  # of a text's characters; above it, a fixed text that is put in is Chinese
PADDING_ROWS = 64
EXTRA_PADDING = 8


@dataclass(frozen=True)
class Pair:
    """A preference pair as text and as ids; the responses end with the EOS."""

    row: Row
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass
class Subject:
    """The reward model that is looked at, with all that it takes to score text.

    Attributes:
        model: dropout off, in eval mode.
        renderer: of its tokenizer.
        limit: most tokens of a sequence; what does not fit is left out.
    """

    model: PreTrainedModel
    renderer: Renderer
    limit: int

    @property
    def pad_id(self) -> int:
        """Padding token."""
        return self.renderer.tokenizer.pad_token_id

    def scores(self, sequences: list[list[int]], what: str) -> np.ndarray:
        """Raw scores [N] as PPO reads them; NaN where a sequence is longer than the limit, and nowhere else.

        Args:
            sequences: N rows of ids, prompt and response.
            what: they are, for the error.

        Raises:
            UserError: a score is not finite.
        """
        result = np.full(len(sequences), np.nan)
        fits = [number for number, ids in enumerate(sequences) if 0 < len(ids) <= self.limit]
        result[fits] = check_finite(
            score_sequences(self.model, [sequences[number] for number in fits], self.pad_id), what
        )
        return result

    def pair(self, row: Row) -> Pair:
        """The row with its token ids."""
        prompt = self.renderer.prompt_ids(row["prompt"])
        return Pair(row, prompt, *self.renderer.all_response_ids([row["prompt"]] * 2, [row["chosen"], row["rejected"]]))

    def scores_of(self, pairs: Sequence[Pair], what: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the chosen and of the rejected responses, [N] each; see `scores`."""
        chosen = self.scores([pair.prompt_ids + pair.chosen_ids for pair in pairs], what)
        return chosen, self.scores([pair.prompt_ids + pair.rejected_ids for pair in pairs], what)


def check_finite(scores: Sequence[float], what: str) -> np.ndarray:
    """The scores [N] of `what`.

    Raises:
        UserError: one is NaN or infinite. As a number it would count as a wrong answer, or as one that was left out.
    """
    found = np.asarray(scores, dtype=float)
    lost = int((~np.isfinite(found)).sum())
    if lost:
        raise UserError(
            f"reward: {lost} of {len(found)} {what} have no finite score: has the training diverged? "
            "Lower reward.trainer.learning_rate, or raise warmup_steps"
        )
    return found


# -------------------------------------------------------------------------------------------------------------- edits
FILLER = "That is all there is to say about this.", "以上就是关于这个问题的全部内容。"
THANKS = "Thanks!", "谢谢！"


def _parts(text: str) -> tuple[str, str, str, int]:
    """Leading space, the rest, what stands between words, and which language a fixed text is put in (0 en, 1 zh)."""
    body = text.strip()
    chinese = int(cjk_share([text]) > CJK_SHARE)
    return text[: len(text) - len(text.lstrip())], body, "" if chinese else " ", chinese


def _padded(text: str, rng: random.Random) -> str:
    lead, body, space, language = _parts(text)
    return lead + body + space + FILLER[language]


def _repeated(text: str, rng: random.Random) -> str:
    lead, body, space, _ = _parts(text)
    return lead + body + space + body


def _thanked(text: str, rng: random.Random) -> str:
    lead, body, space, language = _parts(text)
    return lead + THANKS[language] + space + body


def _thanks_alone(text: str, rng: random.Random) -> str:
    lead, _, _, language = _parts(text)
    return lead + THANKS[language]


def _shuffled(text: str, rng: random.Random) -> str:
    lead, body, space, _ = _parts(text)
    words = tokenize(body)
    rng.shuffle(words)
    return lead + space.join(words)


TEXT_EDITS: dict[str, Callable[[str, random.Random], str]] = {
    "padded": _padded,
    "repeated": _repeated,
    "thanks": _thanked,
    "shuffled": _shuffled,
    "thanks alone": _thanks_alone,
    "empty": lambda text, rng: "",
}
ID_EDITS: dict[str, Callable[[list[int]], list[int]]] = {
    "no EOS": lambda ids: ids[:-1] or ids,
    "cut in half": lambda ids: ids[: max(1, len(ids) // 2)],
}
EDITS = {
    "padded": "a sentence without content at the end",
    "repeated": "said twice",
    "thanks": "“Thanks!” (“谢谢！”) in front",
    "shuffled": "the words in random order",
    "no EOS": "without the token that ends it",
    "cut in half": "its first half, without EOS",
    "thanks alone": "replaced by “Thanks!” (“谢谢！”)",
    "empty": "replaced by nothing but EOS",
}


def edits(
    subject: Subject, pairs: Sequence[Pair], scores: tuple[np.ndarray, np.ndarray], std: float, seed: int
) -> list[dict[str, Any]]:
    """What each edit does to the score: answers that are worse, or at least no better, should not gain.

    Args:
        subject: the reward model.
        pairs: N held-out pairs.
        scores: of their chosen and rejected answers, [N] each.
        std: of the scores of unedited answers; gains are measured in it.
        seed: of the shuffling.

    Returns:
        Per edit: its name, what it does, `n` answers that fitted; `gain`: mean change of the score in std with its 95 %
        bootstrap interval over pairs; `rose`: share of answers that gained; `wins`: share of pairs whose edited worse
        answer is above the better one as it was, with its Wilson interval; `wins_before`: the same without the edit.
    """
    chosen, rejected = scores
    result = []
    for name, meaning in EDITS.items():
        new = [_edited(subject, name, pair, seed + number) for number, pair in enumerate(pairs)]
        new_chosen, new_rejected = (subject.scores([ids[side] for ids in new], f"answers {name!r}") for side in (0, 1))
        fits = ~np.isnan(new_chosen) & ~np.isnan(new_rejected)
        row: dict[str, Any] = {"edit": name, "meaning": meaning, "n": int(2 * fits.sum())}
        if fits.any():
            gains = np.stack([new_chosen - chosen, new_rejected - rejected], axis=1)[fits] / std
            wins = wilson_interval(float(correct(new_rejected - chosen)[fits].sum()), int(fits.sum()))
            row["gain"] = _plain(bootstrap_interval(gains.mean(axis=1), seed=seed))
            row["rose"] = float((gains > 0).mean())
            row["wins"] = _plain(wins)
            row["wins_before"] = float(correct(rejected - chosen)[fits].mean())
        result.append(row)
    return result


def _edited(subject: Subject, name: str, pair: Pair, seed: int) -> tuple[list[int], list[int]]:
    """Prompt and edited response, of the chosen and of the rejected one."""
    if name in ID_EDITS:
        responses = [ID_EDITS[name](pair.chosen_ids), ID_EDITS[name](pair.rejected_ids)]
    else:
        texts = [TEXT_EDITS[name](pair.row[side], random.Random(seed)) for side in ("chosen", "rejected")]
        responses = subject.renderer.all_response_ids([pair.row["prompt"]] * 2, texts)
    return pair.prompt_ids + responses[0], pair.prompt_ids + responses[1]


def _plain(interval: Any) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n}


# ----------------------------------------------------------------------------------------------------------- relevance
CANDIDATES = 4  # answers that are tried on every prompt
BLANKET_PROMPTS = 64


def relevance(subject: Subject, pairs: Sequence[Pair], chosen: np.ndarray, std: float, seed: int) -> dict[str, Any]:
    """Whether an answer has to be about its prompt: good answers to other prompts should lose to the own one.

    Args:
        subject: the reward model.
        pairs: N held-out pairs.
        chosen: scores of their better answers, [N].
        std: of the scores of unedited answers.
        seed: of who answers whom.

    Returns:
        `off_topic`: over prompts that got the better answer of another pair, `n`, `gain` in std with its 95 % bootstrap
        interval, and `wins`, the share in which it is above the own better answer, with its Wilson interval.
        `blanket`: of the four answers that did best in a strange place the one that wins on most prompts: its text in
        `answer`, `wins` over `n` prompts that are not its own. Empty where no pair has another prompt beside it.
    """
    others = _partners([pair.prompt_ids for pair in pairs], seed)
    if not others:
        return {}
    sequences = [pairs[at].prompt_ids + pairs[other].chosen_ids for at, other in others.items()]
    strange = subject.scores(sequences, "answers to other prompts")
    leads = {at: score - chosen[at] for at, score in zip(others, strange, strict=True) if not np.isnan(score)}
    if not leads:
        return {}
    gains = np.array(list(leads.values()))
    wins = _plain(wilson_interval(float(correct(gains).sum()), len(gains)))
    found = {"off_topic": {"n": len(gains), "gain": _plain(bootstrap_interval(gains / std, seed=seed)), "wins": wins}}
    best = sorted(leads, key=lambda at: -(leads[at] + chosen[at]))[:CANDIDATES]
    tried = [_everywhere(subject, pairs[:BLANKET_PROMPTS], chosen, pairs[others[at]]) for at in best]
    blanket = max(filter(None, tried), key=lambda row: row["wins"]["value"], default=None)
    return found | ({"blanket": blanket} if blanket else {})


def _partners(prompts: list[list[int]], seed: int) -> dict[int, int]:
    """For each pair another one with another prompt, in a seeded order; those that meet their own are left out."""
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    around = zip(order, [*order[1:], *order[:1]], strict=True)
    return dict(sorted((at, other) for at, other in around if prompts[at] != prompts[other]))


def _everywhere(subject: Subject, pairs: Sequence[Pair], chosen: np.ndarray, source: Pair) -> dict[str, Any]:
    """How often the better answer of `source` beats that of the other prompts; empty where it fits none."""
    places = [number for number, pair in enumerate(pairs) if pair.prompt_ids != source.prompt_ids]
    scores = subject.scores([pairs[at].prompt_ids + source.chosen_ids for at in places], "answers to other prompts")
    fits = ~np.isnan(scores)
    leads = (scores - chosen[places])[fits]
    if not len(leads):
        return {}
    wins = _plain(wilson_interval(float(correct(leads).sum()), len(leads)))
    return {"answer": source.row["chosen"], "n": len(leads), "wins": wins}


# --------------------------------------------------------------------------------------------------------- invariances
def padding(subject: Subject, pairs: Sequence[Pair], std: float) -> list[dict[str, Any]]:
    """How far scores move with padding and batch size, which are no part of an answer.

    Against each sequence alone, without padding: in batches; with more padding on the left; and padded on the right
    through the model's own forward, as `AutoModelForSequenceClassification` is used elsewhere.

    Returns:
        Per way: `way`, `n`, and `largest` and `mean` change in std of the scores.
    """
    rows = [pair.prompt_ids + ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    rows = [ids for ids in rows if len(ids) + EXTRA_PADDING <= subject.limit][:PADDING_ROWS]
    if not rows:
        return []
    alone = np.array(score_sequences(subject.model, rows, subject.pad_id, batch_size=1))
    ways = {
        "in batches of 32": np.array(score_sequences(subject.model, rows, subject.pad_id)),
        f"{EXTRA_PADDING} more pads on the left": _with_more_padding(subject, rows),
        "padded on the right, plain forward": _plain_forward(subject, rows),
    }
    changes = {way: np.abs(scores - alone) / std for way, scores in ways.items()}
    return [
        {"way": way, "n": len(rows), "largest": float(change.max()), "mean": float(change.mean())}
        for way, change in changes.items()
    ]


def _with_more_padding(subject: Subject, rows: list[list[int]]) -> np.ndarray:
    """A row of full length in each batch, whose score is not looked at, makes the padding of the others longer."""
    scores = []
    longest = [subject.pad_id] * (max(map(len, rows)) + EXTRA_PADDING)
    for ids in rows:
        scores.append(score_sequences(subject.model, [ids, longest], subject.pad_id)[0])
    return np.array(scores)


@torch.no_grad()
def _plain_forward(subject: Subject, rows: list[list[int]]) -> np.ndarray:
    """The model called as transformers' documentation does it: it finds the last token by the pad id itself."""
    device = next(subject.model.parameters()).device
    scores: list[float] = []
    for first in range(0, len(rows), 32):
        ids, mask = left_pad([row[::-1] for row in rows[first : first + 32]], subject.pad_id)  # mirrored: on the right
        out = subject.model(input_ids=ids.flip(1).to(device), attention_mask=mask.flip(1).to(device))
        scores += out.logits.squeeze(-1).float().tolist()
    return np.array(scores)


def paraphrases(
    subject: Subject, pairs: Sequence[Pair], before: np.ndarray, templates: Sequence[str]
) -> list[dict[str, Any]]:
    """Whether preferences survive another wording of the prompt.

    Args:
        subject: the reward model.
        pairs: N held-out pairs.
        before: [N], their margins.
        templates: each with `{prompt}` once.

    Returns:
        Per template: `template`, accuracy on the pairs that fitted before (`before`) and after (`after`), and `flips`:
        share of pairs whose preference turned, with its Wilson interval.
    """
    result = []
    for template in templates:
        reworded = [
            subject.pair(dict(pair.row) | {"prompt": rephrased(pair.row["prompt"], template)}) for pair in pairs
        ]
        chosen, rejected = subject.scores_of(reworded, f"pairs reworded as {template!r}")
        after = chosen - rejected
        fits = ~np.isnan(after)
        row: dict[str, Any] = {"template": template, "n": int(fits.sum())}
        if fits.any():
            turned = np.sign(before[fits]) != np.sign(after[fits])
            row["flips"] = _plain(wilson_interval(float(turned.sum()), len(turned)))
            row["before"], row["after"] = float(correct(before[fits]).mean()), float(correct(after[fits]).mean())
        result.append(row)
    return result


def rephrased(prompt: Prompt, template: str) -> Prompt:
    """The prompt, or the last message of a conversation, put into `template` at its `{prompt}`."""
    if isinstance(prompt, str):
        return template.replace("{prompt}", prompt)
    return [*prompt[:-1], prompt[-1] | {"content": template.replace("{prompt}", prompt[-1]["content"])}]
