"""From a data recipe to selected.jsonl: which pairs annotators get next."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.artifacts import Artifact, hash_files, sha256_json
from rlhf.data import DataRecipe, load_rows
from rlhf.data.pipeline import Counts, detected, numbered_rows
from rlhf.data.quarantine import Quarantine
from rlhf.data.sources import describe, source_hash
from rlhf.errors import UserError
from rlhf.labels import features
from rlhf.labels.records import VOTES, Row, decided, pair_id, read_labels, read_rows, verdict, why_of, write_rows
from rlhf.labels.selection import METHODS, NEEDS_MODEL, Array, Pool, prepared, select, sigmoid
from rlhf.locks import locked
from rlhf.yamlio import nearest

logger = logging.getLogger(__name__)

WORDS = "words"
SIDES = ("response_a", "response_b")


@dataclass(frozen=True)
class Choice:
    """What is asked for.

    Attributes:
        data: recipe of the pairs; which response it prefers is not looked at.
        split: of it.
        count: pairs to select.
        method: one of `METHODS`.
        seed: of the selection and of the order in which a pair's responses are shown.
        features: `words` (TF-IDF), a folder of a sentence-transformers model, or of a stage (`artifacts/tiny/sft`).
        rewards: reward artifacts; with one its probabilities count, with several also their disagreement.
        chat: whether prompts go through the chat template, for artifacts (`model.chat` of the run's recipe).
        max_length: tokens that an artifact's model reads; of longer pairs the beginning goes.
    """

    data: DataRecipe
    split: str = "train"
    count: int = 100
    method: str = "mix"
    seed: int = 0
    features: str = WORDS
    rewards: tuple[Path, ...] = ()
    chat: bool = False
    max_length: int = 512


def choose(choice: Choice, artifacts: Path, selected: Path, labels: Path) -> list[Row]:
    """Selects pairs and adds them to `selected`, behind those that are there.

    Pairs that were selected or labelled before are not selected again. Labels that are there decide, by the majority of
    each pair's annotators, what the methods take as known.

    Args:
        choice: what is asked for.
        artifacts: the artifact directory, for the cleaned rows.
        selected: file to write or extend.
        labels: labels.jsonl; may not be there yet.

    Returns:
        The new rows, as written.

    Raises:
        UserError: unknown method, no pairs left, a method without what it needs, and what `load_rows` raises.
    """
    _check(choice)
    before = read_rows(selected) if selected.exists() else []
    decisions = decided(read_labels(labels))
    known = _labelled(decisions)
    taken = {row["pair"] for row in before} | {pair for pair, found in decisions.items() if found}
    rows = {_id(row): row for row in load_rows(choice.data, choice.split, "pairs", root=artifacts)}
    candidates = {pair: row for pair, row in rows.items() if pair not in taken}
    where = f"data recipe {choice.data.name!r}, split {choice.split!r}"
    if not candidates:
        raise UserError(f"{where}: all {len(rows)} pairs are selected or labelled already: label those, or add data")
    if choice.method in NEEDS_MODEL and not (known or choice.rewards):
        raise UserError(
            f"--method {choice.method}: knows nothing yet: name a reward model (--reward), or label some pairs that "
            "another method selects (mix, information, diversity, random)"
        )
    pool = _pool(choice, list(candidates.values()), known)
    found = select(choice.method, pool, choice.count, choice.seed)
    names = list(candidates)
    why = {"method": choice.method, "round": 1 + max((why_of(row).get("round", 0) for row in before), default=0)}
    about = {"features": choice.features, "hash": _identity(choice), "labels": len(known)}
    origin = _origin(choice)
    others = {str((row.get("from") or {}).get("source")) for row in before} - {str(origin["source"])}
    if others:
        logger.warning("%s: also holds pairs of %s: another --pairs keeps them apart", selected, ", ".join(others))
    new = [
        _row(names[row], candidates[names[row]], why | {"score": round(float(score), 6)}, origin, choice.seed)
        | {"model": about}
        for row, score in zip(found.rows, found.scores, strict=True)
    ]
    selected.parent.mkdir(parents=True, exist_ok=True)
    with locked(selected.with_name(f"{selected.name}.lock")):  # and what another process selected meanwhile stays
        before = read_rows(selected) if selected.exists() else []
        there = {row["pair"] for row in before}
        new = [row for row in new if row["pair"] not in there]
        write_rows(selected, [*before, *new])
    logger.info("%s: %d of %d pairs by %s, behind %d", selected, len(new), len(candidates), choice.method, len(before))
    return new


def _check(choice: Choice) -> None:
    if choice.method not in METHODS:
        raise UserError(
            f"--method {choice.method!r}: no such method{nearest(choice.method, METHODS)}; known: {', '.join(METHODS)}"
        )
    if choice.count < 1:
        raise UserError(f"--count {choice.count}: must be at least 1")
    if choice.features != WORDS and not Path(choice.features).is_dir():
        raise UserError(
            f"--features {choice.features!r}: no stage of the run and no folder; known without one: {WORDS}"
        )
    if choice.method == "disagreement" and len(choice.rewards) == 1:
        raise UserError("--reward: one model cannot disagree with itself: name two or more, or none (heads on labels)")


def _id(row: Row) -> str:
    return pair_id(row["prompt"], *(row[side] for side in SIDES))


def _labelled(decisions: dict[str, dict[str, Row]]) -> list[Row]:
    """Pairs that have a majority, the preferred response as `response_a`."""
    known = []
    for found in decisions.values():
        votes = [row for row in found.values() if row["label"] in VOTES]
        label = verdict(row["label"] for row in votes)[0] if votes else "tie"
        if label != "tie":
            a, b = (votes[0][side] for side in (SIDES if label == "a" else SIDES[::-1]))
            known.append({"prompt": votes[0]["prompt"], "response_a": a, "response_b": b})
    return known


def _pool(choice: Choice, candidates: Sequence[Row], known: Sequence[Row]) -> Pool:
    if choice.method == "random":
        return Pool(np.zeros((len(candidates), 1)), np.zeros((len(known), 1)))
    both = [*candidates, *known]
    x = prepared(_differences(choice, both), features.longer(both))
    votes = np.stack([_probabilities(choice, path, candidates) for path in choice.rewards]) if choice.rewards else None
    mean = None if votes is None else votes.mean(axis=0)
    return Pool(x[: len(candidates)], x[len(candidates) :], mean, votes if len(choice.rewards) > 1 else None)


def _differences(choice: Choice, pairs: Sequence[Row]) -> Array:
    if choice.features == WORDS:
        return features.word_differences(pairs)
    path = Path(choice.features)
    if not (path / "manifest.json").is_file():
        from rlhf.data.cleaning.semantic import load_embedder

        return features.embedding_differences(pairs, load_embedder(path))
    from rlhf.models import load_model

    model_dir = Artifact.load(path).model_dir
    model = load_model(model_dir, "score" if path.name.startswith("reward") else "causal")
    longest = _longest(choice, model_dir)
    return features.state_differences(pairs, model.eval(), _renderer(model_dir, choice.chat), longest)


def _probabilities(choice: Choice, path: Path, pairs: Sequence[Row]) -> Array:
    """[N] that response_a is preferred, by a reward artifact."""
    import torch

    from rlhf.models import load_model
    from rlhf.sampling import score_sequences

    artifact = Artifact.load(path)
    renderer = _renderer(artifact.model_dir, choice.chat)
    model = load_model(artifact.model_dir, "score").eval()
    longest = _longest(choice, artifact.model_dir)
    ids = [[features.pair_ids(pair, side, renderer) for pair in pairs] for side in SIDES]
    cut = sum(max(map(len, both)) > longest for both in zip(*ids, strict=True))
    if cut:
        logger.warning("%s: reads the last %d tokens of %d longer pairs (of %d)", path, longest, cut, len(pairs))
    ids = [[row[-longest:] for row in side] for side in ids]
    with torch.no_grad():
        a, b = (np.array(score_sequences(model, side, renderer.tokenizer.pad_token_id)) for side in ids)
    return sigmoid(a - b)


def _longest(choice: Choice, model_dir: Path) -> int:
    """Tokens that a model is given: no more than it has positions."""
    from rlhf.models import position_limit

    return min(choice.max_length, position_limit(model_dir) or choice.max_length)


def _renderer(model_dir: Path, chat: bool) -> Any:
    from rlhf.data import Renderer
    from rlhf.models import load_tokenizer

    return Renderer(load_tokenizer(model_dir), chat)


def _identity(choice: Choice) -> str | None:
    """Hash of all models that were looked at; None for words alone."""
    path = Path(choice.features)
    seen = {}
    if choice.features != WORDS and choice.method != "random":
        is_artifact = (path / "manifest.json").is_file()
        seen["features"] = Artifact.load(path).hash if is_artifact else sha256_json(hash_files(path))
    seen |= {path.name: Artifact.load(path).hash for path in choice.rewards}
    return sha256_json(seen) if seen else None


def _origin(choice: Choice) -> dict[str, Any]:
    """What `from` says of every pair, and under `rows` the number in the source of each whose text was not cleaned."""
    recipe = choice.data
    about: dict[str, Any] = {"recipe": recipe.name, "split": choice.split}
    if recipe.source is None:  # a mixture
        return about | {"source": None, "sha256": None, "rows": {}}
    rows: dict[str, int] = {}
    with Quarantine() as quarantine:
        for number, _, row in numbered_rows(detected(recipe), Counts(quarantine), choice.split):
            names = SIDES if SIDES[0] in row else ("chosen", "rejected")
            rows.setdefault(pair_id(row["prompt"], *(row[name] for name in names)), number)
    return about | {"source": describe(recipe.source), "sha256": source_hash(recipe.source), "rows": rows}


def _row(pair: str, row: Row, why: dict[str, Any], origin: dict[str, Any], seed: int) -> Row:
    """A line of selected.jsonl. A coin that depends on the seed and the pair decides which response is A."""
    swapped = hashlib.sha256(f"order {seed} {pair}".encode()).digest()[0] % 2 == 1
    a, b = (row[side] for side in (SIDES[::-1] if swapped else SIDES))
    where = {name: value for name, value in origin.items() if name != "rows"} | {"row": origin["rows"].get(pair)}
    return {
        "pair": pair,
        "prompt": row["prompt"],
        "response_a": a,
        "response_b": b,
        "why": why | {"order": "swapped" if swapped else "source"},
        "from": where,
    }
