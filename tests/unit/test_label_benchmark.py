"""benchmarks/label_efficiency.py: its sums, its table, and that selection does not see the labels."""

import json

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from benchmarks import label_efficiency as bench
from rlhf.errors import UserError
from rlhf.labels.selection import METHODS
from rlhf.models import load_model
from tests.builders import build_model, build_tokenizer
from tests.tolerances import assert_close


def test_labels_needed_between_two_shares():
    shares, curve = (0.1, 0.2, 0.4), np.array([0.5, 0.6, 0.7])
    assert bench.needed(curve, 0.65, shares) == pytest.approx(0.2 * 2**0.5)  # half way in the log
    assert bench.needed(curve, 0.4, shares) == 0.1
    assert bench.needed(curve, 0.8, shares) == 1.0
    assert bench.monotone(np.array([0.5, 0.7, 0.6])) == pytest.approx([0.5, 0.65, 0.65])


def test_intervals_over_seeds():
    # Mean 2, standard deviation 1, t of 2 degrees of freedom 4.3027: half width 4.3027 / sqrt(3).
    assert bench.interval(np.array([1.0, 2.0, 3.0])) == pytest.approx([2, 2 - 2.48414, 2 + 2.48414], abs=1e-4)


def test_summary_of_a_method_that_needs_half_the_labels():
    # Random reaches at 20 % what the other one reaches at 10 %, for every seed; the target is 0.5 + 0.95 * 0.5.
    shares = (0.05, 0.1, 0.2, 1.0)
    curves = {"random": [[0.6, 0.7, 0.975, 1.0]] * 3, "mix": [[0.7, 0.975, 0.98, 1.0]] * 3}
    found = bench.summary(curves, shares)
    assert found["mix"]["fewer_labels"] == pytest.approx([2, 2, 2])
    assert found["mix"]["labels_to_target"] == pytest.approx([0.1] * 3)
    assert found["random"]["kept_at_goal"][0] == pytest.approx(0.95)
    assert found["mix"]["gain_at_goal"][0] == pytest.approx(0.005)


@pytest.mark.parametrize("method", METHODS)
def test_selection_does_not_see_the_labels(method):
    # Labels of pairs that are not selected may be anything: turned round, the same pairs are selected.
    pairs = np.random.default_rng(0).normal(size=(80, 3))
    first = bench.rounds(pairs, method, 0, (0.1, 0.3))
    assert [len(rows) for rows in first] == [8, 24] and len(set(first[1])) == 24
    turned = pairs * np.where(np.isin(np.arange(80), first[0]), 1.0, -1.0)[:, None]
    assert bench.rounds(turned, method, 0, (0.1, 0.3))[1].tolist() == first[1].tolist()


def test_held_out_groups_are_whole():
    groups = np.repeat(np.arange(8), 5)
    test = bench.held_out(groups, 0)
    assert test.sum() == 10 and all(len(set(test[groups == group])) == 1 for group in range(8))


def test_the_page_shows_the_measured_figures():
    report = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    page = bench.PAGE.read_text(encoding="utf-8")
    assert page == bench.with_tables(page, report), "run `python -m benchmarks.label_efficiency --table`"
    assert "| mix |" in page


def toy(tmp_path, layers: int = 1) -> list[str]:
    """A set in which "good" wins, a model, and the command that trains whole reward models of it."""
    rows = [
        {"prompt": f"t {i % 8} Stance: x", "chosen": "good " * (1 + i % 3), "rejected": f"bad {i}"} for i in range(48)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "toy.yaml").write_text(f"name: toy\nsource: {{files: {tmp_path / 'rows.jsonl'}}}\nclean: []\n")
    (tmp_path / "rows.jsonl").write_text(lines)
    tokenizer = build_tokenizer()
    for part in (tokenizer, build_model(tokenizer, n_layer=layers)):
        part.save_pretrained(tmp_path / "model")
    command = ["--full", str(tmp_path / "model"), "--data", str(tmp_path / "toy.yaml")]
    return [*command, "--out", str(tmp_path / "out.json"), "--batch", "12", "--learning-rate", "1e-2"]


def test_whole_reward_models_on_a_toy(tmp_path):
    bench.main([*toy(tmp_path), "--seeds", "2", "--epochs", "3"])
    (entry,) = json.loads((tmp_path / "out.json").read_text())["full"]
    found = entry["sets"][str(tmp_path / "toy.yaml")]
    assert found["pairs"] == 48 and list(found["runs"]) == ["0", "1"]
    assert [list(runs) for runs in found["runs"].values()] == [["all", "random", "mix"]] * 2
    assert [run["labels"] for run in found["runs"]["0"].values()] == [36, 7, 7]
    summary = bench.full_summary(found, "mix")
    assert summary["seeds"] == 2 and summary["arms"]["all"]["accuracy"][0] > 0.9  # "good" against "bad" can be learned
    assert 0 <= summary["arms"]["mix"]["accuracy"][0] <= 1


def test_whole_reward_models_go_on_after_an_interruption(tmp_path, monkeypatch):
    command, out, trained = toy(tmp_path, layers=3), tmp_path / "out.json", []
    name = str(tmp_path / "toy.yaml")

    def train(args, folder, tokenizer, ids, rows, test, seed):
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append((len(rows), seed, load_model(folder).config.num_hidden_layers))
        return 0.6 + seed / 10

    monkeypatch.setattr(bench, "train_and_test", train)
    with pytest.raises(KeyboardInterrupt):
        bench.main([*command, "--layers", "2", "--seeds", "2"])
    assert trained == [(36, 0, 2), (7, 0, 2), (7, 0, 2), (36, 1, 2)]
    (entry,) = json.loads(out.read_text())["full"]
    assert [list(runs) for runs in entry["sets"][name]["runs"].values()] == [["all", "random", "mix"], ["all"]]
    assert "| 1 | 20 %, mix | 60.0 | 100 % |" in "\n".join(bench._full_table([entry]))  # whole seeds alone
    trained.clear()
    bench.main([*command, "--layers", "2", "--seeds", "2"])
    assert trained == [(7, 1, 2), (7, 1, 2)]
    (entry,) = json.loads(out.read_text())["full"]
    table = "\n".join(bench._full_table([entry]))
    assert "**Whole reward models, model, first 2 of 3 layers** (epochs 2, least steps 150, " in table
    assert "limit" not in table
    assert "| 2 | all | 65.0 [1.5, 128.5] | - |" in table  # t of one degree of freedom: 12.706 * 5
    trained.clear()
    bench.main([*command, "--seeds", "1"])  # other settings stand beside those that are there
    assert [layers for _, _, layers in trained] == [3, 3, 3]
    entries = json.loads(out.read_text())["full"]
    assert [bench.title(entry) for entry in entries] == ["model, first 2 of 3 layers", "model"]
    assert entries[0] == entry


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, LlamaForCausalLM])
def test_the_first_layers_are_a_model_of_their_own(kind, tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = kind(kind.config_class(**sizes, num_hidden_layers=3)).eval()
    ids, states = torch.arange(6)[None], []
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    blocks[1].register_forward_hook(lambda module, given, out: states.append(out[0] if isinstance(out, tuple) else out))
    model(input_ids=ids)
    norm = model.base_model.ln_f if kind is GPT2LMHeadModel else model.base_model.norm
    expected = norm(states[0]).detach()
    bench.keep_first_layers(model, 2)
    model.save_pretrained(tmp_path)
    small = load_model(tmp_path)
    assert small.config.num_hidden_layers == 2
    assert_close(small.base_model(input_ids=ids).last_hidden_state, expected)
    with pytest.raises(UserError, match="--layers 3: the model has 2 layers"):
        bench.keep_first_layers(model, 3)
