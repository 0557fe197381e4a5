"""Contamination: training rows that hold a piece of an evaluation text (n-gram overlap, GPT-3, Brown et al. 2020)."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from rlhf.data.cleaning.base import Row, StepConfig, StepResult, joined, split_result
from rlhf.data.cleaning.rules import units
from rlhf.errors import UserError

Gram = tuple[str, ...]


class ContaminationStep(StepConfig):
    """Drops rows that share an n-gram with an evaluation set."""

    step: Literal["contamination"] = "contamination"
    sets: list[str] = Field(
        default_factory=list, description="In a recipe: data recipes of the evaluation sets, by name or path."
    )
    ngram: int = Field(default=13, ge=2, description="Words (Chinese: characters) in a row that make an overlap.")
    min_units: int = Field(
        default=8, ge=2, description="Evaluation texts shorter than an n-gram count whole, from this many words on."
    )
    max_eval_texts: int = Field(
        default=10, ge=1, description="An n-gram that stands in more evaluation texts is a template and is ignored."
    )


@dataclass(frozen=True)
class EvalIndex:
    """The n-grams of the evaluation sets. Pass it instead of the texts when a step runs on many chunks.

    Attributes:
        sets: n-gram -> name of an evaluation set that holds it.
        sizes: lengths that occur: the configured n, and those of shorter whole texts.
    """

    sets: dict[Gram, str]
    sizes: tuple[int, ...]


def eval_index(eval_sets: Mapping[str, Iterable[str]], config: ContaminationStep) -> EvalIndex:
    """Indexes evaluation texts.

    Args:
        eval_sets: name -> texts (prompts, reference answers).
        config: the step's.

    Raises:
        UserError: no text is long enough to be looked for.
    """
    owner: dict[Gram, str] = {}
    count: Counter[Gram] = Counter()
    for name, texts in eval_sets.items():
        for text in texts:
            found = units(text)
            if len(found) < config.min_units:
                continue
            grams = set(_grams(found, min(config.ngram, len(found))))
            count.update(grams)
            for gram in grams:
                owner.setdefault(gram, name)
    kept = {gram: name for gram, name in owner.items() if count[gram] <= config.max_eval_texts}
    if not kept:
        raise UserError(
            f"contamination: no evaluation text of {', '.join(eval_sets) or 'no set'} has {config.min_units} words or "
            "more; give texts, or lower min_units"
        )
    return EvalIndex(kept, tuple(sorted({len(gram) for gram in kept})))


def contamination_step(
    rows: Sequence[Row], config: ContaminationStep, eval_sets: Mapping[str, Iterable[str]] | EvalIndex
) -> StepResult:
    """Drops rows that share an n-gram with an evaluation text; case, spacing and punctuation do not matter.

    Each column is one text: an n-gram does not reach from a prompt into the completion, but over messages.

    Raises:
        UserError: see `eval_index`.
    """
    index = eval_sets if isinstance(eval_sets, EvalIndex) else eval_index(eval_sets, config)
    reasons: dict[int, tuple[str, str]] = {}
    per_set: Counter[str] = Counter()
    for number, row in enumerate(rows):
        for name, value in row.items():
            if config.columns is not None and name not in config.columns:
                continue
            gram = _overlap(units(joined(value)), index)
            if gram is not None:
                reasons[number] = ("contamination", f"{index.sets[gram]}: {' '.join(gram)!r}")
                per_set[index.sets[gram]] += 1
                break
    return split_result(rows, reasons, {"per_set": dict(sorted(per_set.items()))})


def _overlap(found: list[str], index: EvalIndex) -> Gram | None:
    for size in index.sizes:
        for gram in _grams(found, size):
            if gram in index.sets:
                return gram
    return None


def _grams(found: list[str], size: int) -> Iterable[Gram]:
    return zip(*(found[start:] for start in range(size)), strict=False)
