"""Model-based filter: drops rows whose texts a classifier finds unsafe (any AutoModelForSequenceClassification)."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field

from rlhf.data.cleaning.base import Row, StepConfig, StepResult, split_result, texts_of
from rlhf.errors import UserError

Classify = Callable[[list[str]], list[dict[str, float]]]


class SafetyStep(StepConfig):
    """Drops rows with a text that a classifier finds unsafe."""

    step: Literal["safety"] = "safety"
    model: str | None = Field(
        default=None, min_length=1, description="In a recipe: folder or Hub id of the classifier; `labels` are its own."
    )
    labels: list[str] = Field(min_length=1, description="Labels that mean unsafe; their probabilities are added.")
    threshold: float = Field(default=0.5, gt=0, le=1, description="Probability from which a row goes.")
    max_length: int = Field(default=512, ge=2, description="Tokens per text; the rest is cut off.")
    batch_size: int = Field(default=32, ge=1, description="Texts per forward pass.")


def safety_step(rows: Sequence[Row], config: SafetyStep, classify: Classify) -> StepResult:
    """Drops each row with a text whose unsafe labels reach `threshold` together.

    Args:
        rows: any rows; each is decided on alone.
        config: the step's.
        classify: texts -> per text the probability of each label; `load_classifier` makes one.

    Returns:
        Report: `texts` that were looked at, and `by_label`, rows by the strongest unsafe label.

    Raises:
        UserError: the classifier has no such label.
    """
    owners, texts = [], []
    for number, row in enumerate(rows):
        for text in texts_of(row, config.columns):
            owners.append(number)
            texts.append(text)
    worst: dict[int, tuple[float, str]] = {}
    for number, found in zip(owners, classify(texts) if texts else [], strict=True):
        unsafe = {label: _probability(found, label) for label in config.labels}
        total = min(sum(unsafe.values()), 1.0)
        if total >= config.threshold and total > worst.get(number, (0.0, ""))[0]:
            worst[number] = (total, max(unsafe, key=lambda label: unsafe[label]))
    reasons = {n: ("unsafe", f"{label} {p:.2f}, threshold {config.threshold:g}") for n, (p, label) in worst.items()}
    by_label = Counter(label for _, label in worst.values())
    return split_result(rows, reasons, {"texts": len(texts), "by_label": dict(sorted(by_label.items()))})


def _probability(found: dict[str, float], label: str) -> float:
    if label not in found:
        raise UserError(f"safety.labels: the classifier has no label {label!r}; it has {', '.join(found)}")
    return found[label]


def load_classifier(path: str, max_length: int = 512, batch_size: int = 32, device: str = "cpu") -> Classify:
    """A `classify` from a sequence-classification model: softmax over its labels, sigmoid of multi-label models.

    Args:
        path: folder of the model, or its Hub id.
        max_length: tokens per text; the rest is cut off.
        batch_size: texts per forward pass; 1 where the tokenizer has no pad token.
        device: `cpu`, `cuda`, ...

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForSequenceClassification.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"safety.model: cannot load {path!r} ({reason}); give a model folder") from error
    model = model.to(device).eval()
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    tokenizer.padding_side = "right"  # an encoder reads its first token
    max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    size = batch_size if tokenizer.pad_token is not None else 1
    multi = model.config.problem_type == "multi_label_classification" or len(names) == 1

    def classify(texts: list[str]) -> list[dict[str, float]]:
        out: list[dict[str, float]] = [{} for _ in texts]
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # like lengths: little padding
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            ids = _encoded(tokenizer, [texts[number] for number in batch], max_length).to(device)
            with torch.no_grad():
                logits = model(**ids).logits.float()
            probabilities = (logits.sigmoid() if multi else logits.softmax(-1)).tolist()
            for number, row in zip(batch, probabilities, strict=True):
                out[number] = dict(zip(names, row, strict=True))
        return out

    return classify


def _encoded(tokenizer: Any, texts: list[str], max_length: int) -> Any:
    return tokenizer(texts, padding=len(texts) > 1, truncation=True, max_length=max_length, return_tensors="pt")
