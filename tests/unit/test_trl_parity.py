"""Our functions and models give the numbers that TRL 1.12's PPOTrainer gave, by its conventions.

The file holds what TRL computed: `python -m benchmarks.trl_parity --fixture tests/data/trl_1_12.safetensors` wrote it.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.trl_parity import FLOAT32, Row, compare, run_of

RECORDED = Path(__file__).parents[1] / "data" / "trl_1_12.safetensors"
# What our conventions change; every other quantity has to be the same without any adjustment.
OURS_DIFFERS = {
    "rewards",
    "returns",
    "advantages, whitened",
    "rewards with k3, whitened",
    "pg_loss, epochs 1 to 4",
    "approxkl, epochs 1 to 4",
    "vf_loss, epochs 1 to 4",
    "vf_clipfrac, epochs 1 to 4",
    "first gradient, per parameter",
    "first gradient, norm",
    "first gradient, 4 micro-batches",
    "optimizer steps, 2 mini-batches",
    "optimizer steps, 4 micro-batches",
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(RECORDED)


def compared(recorded: dict[str, Tensor]) -> dict[str, Row]:
    weights = {name: value for name, value in recorded.items() if "/" not in name}
    return {row.quantity: row for row in compare(weights, recorded)}


def test_every_quantity_agrees_by_trl_conventions(recorded: dict[str, Tensor]) -> None:
    apart = {name: row.adjusted for name, row in compared(recorded).items() if not row.agrees}
    assert apart == {}


def test_our_conventions_change_what_the_table_names_and_nothing_else(recorded: dict[str, Tensor]) -> None:
    rows = compared(recorded)
    assert {name for name, row in rows.items() if row.own > FLOAT32} == OURS_DIFFERS
    assert {"logprobs", "ref_logprobs", "values", "KL per token, k1", "KL per token, k3"} <= rows.keys()


def test_the_recorded_update_is_one_that_tells(recorded: dict[str, Tensor]) -> None:
    """Early and late ends, left padding, a KL, and clipped tokens in both losses."""
    whole = run_of(recorded, "whole")
    lengths = (~whole["padding_mask"]).sum(dim=1)
    assert lengths.min() < 6 and lengths.max() == 12
    assert bool((whole["query_responses"][:, 0] == 0).any())
    assert whole["kl"].abs().max() > 0.1
    assert whole["pg_clipfrac_stats"].max() > 0.02 and whole["vf_clipfrac_stats"].max() > 0.02


@pytest.mark.parametrize("name", ["kl", "scores", "values", "rewards", "gradient.policy.transformer.ln_f.bias"])
def test_a_wrong_number_is_seen(recorded: dict[str, Tensor], name: str) -> None:
    changed = recorded | {f"whole/{name}": recorded[f"whole/{name}"] + 1e-3}
    assert not all(row.agrees for row in compared(changed).values())


def test_rows_of_the_recorded_batch_are_shuffled_and_whole(recorded: dict[str, Tensor]) -> None:
    rows = run_of(recorded, "whole")["rows"]
    assert torch.equal(rows.sort(dim=1).values, torch.arange(16).expand(4, 16))
    assert not torch.equal(rows[0], torch.arange(16))
