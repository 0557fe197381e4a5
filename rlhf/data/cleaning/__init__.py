"""Cleaning: steps as data. A step is a typed config and a function of rows; nothing here reads or writes files but
the lists that a config names.

    result = run_step(PiiStep(kinds=["EMAIL", "PHONE"]), rows)
    result.rows      the kept rows, in input order; changed rows are copies
    result.index     where each kept row stood in the input
    result.dropped   Dropped(index, row, reason, detail) for each row taken out
    result.report    JSON-like figures

The interface, for whoever runs the steps:

* A config says which step it is by its field `step`: `{step: pii, kinds: [EMAIL]}`. `CleaningStep` is the union of all,
  for a list in a recipe: `clean: list[CleaningStep]`.
* A row is a dict of texts, messages (lists of dicts) and other values. A step reads all texts, or those of `columns`;
  the roles of messages and values that are no text stay as they are.
* `SCOPE[step]` is "row" or "set". A row step decides on each row alone: run it on chunks, in as many processes as you
  like, and add the results up with `merge`; the outcome is the same for any chunks. Configs, `run_step` and results can
  be pickled. A set step needs all rows at once.
* Set steps that remove duplicates take `splits`, the name of each row's split, and clean across them: pass the rows of
  all splits together, and carry the names along with `result.index`.
* What is no data is a keyword of the step: `eval_sets` (contamination), `embed` (semantic), `classify` (safety),
  `model` and `tokenizer` (perplexity). In a data recipe the fields `sets` and `model` name them.
* Nothing is random but what a config's `seed` fixes; the same rows in the same order give the same result.
* Packages of the extras `data` and `semantic` are imported when a step first needs them; a UserError names the extra
  when one is missing.

docs/cleaning.md has each step's rule, default, source and limits.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf.data.cleaning.base import Dropped, Row, StepConfig, StepResult, added
from rlhf.data.cleaning.contamination import ContaminationStep, contamination_step
from rlhf.data.cleaning.difficulty import PerplexityStep, perplexity_step
from rlhf.data.cleaning.duplicates import ExactStep, NearStep, exact_step, near_step
from rlhf.data.cleaning.language import LanguageStep, language_step
from rlhf.data.cleaning.pii import PiiStep, pii_step
from rlhf.data.cleaning.preferences import PreferenceStep, preference_step
from rlhf.data.cleaning.rules import (
    BoilerplateStep,
    LengthStep,
    RepetitionStep,
    SensitiveStep,
    boilerplate_step,
    length_step,
    repetition_step,
    sensitive_step,
)
from rlhf.data.cleaning.safety import SafetyStep, safety_step
from rlhf.data.cleaning.semantic import SemanticStep, semantic_step
from rlhf.data.cleaning.text import UnicodeStep, unicode_step

CleaningStep = Annotated[
    UnicodeStep
    | LengthStep
    | RepetitionStep
    | BoilerplateStep
    | LanguageStep
    | SensitiveStep
    | PiiStep
    | SafetyStep
    | ExactStep
    | NearStep
    | ContaminationStep
    | PreferenceStep
    | SemanticStep
    | PerplexityStep,
    Field(discriminator="step"),
]

_FUNCTIONS: dict[type[StepConfig], Callable[..., StepResult]] = {
    UnicodeStep: unicode_step,
    LengthStep: length_step,
    RepetitionStep: repetition_step,
    BoilerplateStep: boilerplate_step,
    LanguageStep: language_step,
    SensitiveStep: sensitive_step,
    PiiStep: pii_step,
    SafetyStep: safety_step,
    ExactStep: exact_step,
    NearStep: near_step,
    ContaminationStep: contamination_step,
    PreferenceStep: preference_step,
    SemanticStep: semantic_step,
    PerplexityStep: perplexity_step,
}
_SET_STEPS = {ExactStep, NearStep, PreferenceStep, SemanticStep, PerplexityStep}
SCOPE: dict[str, Literal["row", "set"]] = {
    config.model_fields["step"].default: "set" if config in _SET_STEPS else "row" for config in _FUNCTIONS
}


def run_step(config: StepConfig, rows: Sequence[Row], **inputs: Any) -> StepResult:
    """Runs one step.

    Args:
        config: one of the configs of `CleaningStep`.
        rows: all rows of a set step, any chunk for a row step; not written to.
        inputs: what the step takes beside rows: `splits`, `eval_sets`, `embed`, `classify`, `model`, `tokenizer`.

    Raises:
        UserError: a package, file or column is missing.
    """
    return _FUNCTIONS[type(config)](rows, config, **inputs)


def merge(results: Sequence[StepResult], sizes: Sequence[int]) -> StepResult:
    """Puts the results of a row step's chunks together, as if it had run on all rows at once.

    Args:
        results: one per chunk, in the order of the chunks.
        sizes: how many rows went into each chunk.
    """
    whole, offset = StepResult([], [], []), 0
    for result, size in zip(results, sizes, strict=True):
        whole.rows += result.rows
        whole.index += [offset + number for number in result.index]
        whole.dropped += [Dropped(offset + item.index, item.row, item.reason, item.detail) for item in result.dropped]
        whole.report = added(whole.report, result.report)
        offset += size
    return whole


__all__ = [
    "SCOPE",
    "BoilerplateStep",
    "CleaningStep",
    "ContaminationStep",
    "Dropped",
    "ExactStep",
    "LanguageStep",
    "LengthStep",
    "NearStep",
    "PerplexityStep",
    "PiiStep",
    "PreferenceStep",
    "RepetitionStep",
    "SafetyStep",
    "SemanticStep",
    "SensitiveStep",
    "StepConfig",
    "StepResult",
    "UnicodeStep",
    "merge",
    "run_step",
]
