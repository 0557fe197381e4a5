"""The same numbers as TRL 1.12's PPOTrainer? Same weights, prompts and sampled tokens, and every quantity of an update.

    make bench-env                                     # once: .venv-trl with TRL 1.12.0
    python -m benchmarks.trl_parity --trl-python .venv-trl/bin/python

TRL makes one update (four epochs) on small random models and saves every tensor of it. Here the same is computed on its
tokens, in float32, by the functions that our trainer uses, twice: by our conventions, and by TRL's where they differ.
The second has to agree; the first shows what the convention is worth on this batch. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedModel

from benchmarks.start import ENVIRONMENT, EOS, PAD, Shape, tokenizer_of
from rlhf.models import ActorCritic, Scorer, last_position, response_logprobs
from rlhf.ppo.advantages import gae, kl_penalty, token_rewards
from rlhf.ppo.losses import policy_loss, value_loss
from rlhf.ppo.masking import masked_moments, masked_whiten
from rlhf.ppo.rewards import shape_scores
from rlhf.recipe import PPOSection

HERE = Path(__file__).resolve().parent
SHAPE = Shape("gpt2", 40, {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}, (3, 8), ends=True)
MEAN, STD = 0.25, 2.0  # statistics of the reward model
SETTINGS = PPOSection(
    data="",
    total_episodes=16,
    rollout_batch_size=16,
    mini_batch_size=16,
    response_length=12,
    learning_rate=5e-3,
    kl_coef=0.2,
    missing_eos_mode="subtract",
)
# Runs of TRL's side: changes of its settings. `two` and `last` show how it counts optimizer steps.
RUNS: dict[str, dict[str, Any]] = {
    "whole": {},
    "micro": {"trl_micro_batch": 4, "ppo": {"num_ppo_epochs": 1}},
    "k3": {"ppo": {"kl_estimator": "k3", "whiten_rewards": True, "num_ppo_epochs": 1}},
    "two": {"trl_micro_batch": 8, "ppo": {"mini_batch_size": 8, "num_ppo_epochs": 1}, "all_steps": False},
    "last": {"trl_micro_batch": 4, "ppo": {"num_ppo_epochs": 1}, "all_steps": False, "prompts_used": 16},
}
TOKENS = ("query_responses", "context_length", "padding_mask")
KEPT = {"micro": (*TOKENS, "rows", "gradient"), "k3": (*TOKENS, "kl", "rewards"), "two": ("optimizer_steps",)}
FLOAT32 = 2e-5  # differences up to this are rounding; gradients and weights after four steps of Adam are looser


# ----------------------------------------------------------------------------------------------------- what is compared
def random_models(seed: int) -> dict[str, PreTrainedModel]:
    """Policy, reference and reward model, far from uniform so that errors show, and all different."""
    models: dict[str, PreTrainedModel] = {}
    for number, name in enumerate(("reference", "reward")):
        torch.manual_seed(seed + number)
        config = SHAPE.config()
        config.num_labels = 1
        model = (GPT2LMHeadModel if name == "reference" else GPT2ForSequenceClassification)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5 if parameter.ndim > 1 else 1)
            bias, embedding = model.transformer.ln_f.bias, model.transformer.wte.weight
            bias += 3 * embedding[EOS] / embedding[EOS].square().sum()  # EOS comes often,
            bias -= 8 * embedding[PAD] / embedding[PAD].square().sum()  # the pad token never: see the last row
        models[name] = model.eval()
    models["policy"] = GPT2LMHeadModel(SHAPE.config()).eval()
    models["policy"].load_state_dict(models["reference"].state_dict())
    with torch.no_grad():
        for parameter in models["policy"].parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return models


def record(models: dict[str, PreTrainedModel], root: Path, python: list[str], seed: int) -> dict[str, Tensor]:
    """TRL's tensors, by run and name."""
    draw = random.Random(seed)
    count = SETTINGS.rollout_batch_size
    lengths = [draw.randint(*SHAPE.prompt_tokens) for _ in range(4 * count)]
    prompts = [[draw.randrange(4, SHAPE.vocab) for _ in range(length)] for length in lengths]
    spec: dict[str, Any] = {"score_mean": MEAN, "score_std": STD, "prompts": prompts, "trl_micro_batch": count}
    spec |= {"ppo": SETTINGS.model_dump(mode="json"), "runs": RUNS, "out": str(root / "trl.safetensors")}
    spec |= {"stop_at_eos": True, "dtype": "float32", "device": "cpu", "seed": seed}
    for name, model in models.items():
        spec[name] = str(root / name)
        model.save_pretrained(root / name)
        tokenizer_of(SHAPE).save_pretrained(root / name)
    (root / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    command = [*python, str(HERE / "trl_side.py"), "record", str(root / "spec.json")]
    subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    return load_file(root / "trl.safetensors")


@dataclass
class Episodes:
    """TRL's tokens of one run as our models take them, and what our models say about them, [B,R] each."""

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor

    @property
    def length(self) -> int:
        """R."""
        return self.mask.shape[1]

    @property
    def longer(self) -> Tensor:
        """TRL's second mask: one more position where there is room."""
        return self.mask | torch.nn.functional.pad(self.mask[:, :-1], (1, 0), value=True)


class Models:
    """Our modules on the recorded weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        config = SHAPE.config()
        config.num_labels = 1
        self.reference = _loaded(GPT2LMHeadModel(SHAPE.config()), weights, "reference.")
        reward = _loaded(GPT2ForSequenceClassification(config), weights, "reward.")
        self.scorer = Scorer(reward)
        critic = _loaded(GPT2ForSequenceClassification(config), weights, "reward.")
        with torch.no_grad():
            critic.score.weight /= STD
        self.trained = ActorCritic(_loaded(GPT2LMHeadModel(SHAPE.config()), weights, "policy."), critic, None)

    def episodes(self, trl: dict[str, Tensor], temperature: float) -> Episodes:
        """What our models say about TRL's tokens."""
        ids, start = trl["query_responses"], int(trl["context_length"])
        ended = (ids[:, start:] == EOS).long().cumsum(dim=1)
        mask = ended - (ids[:, start:] == EOS).long() == 0  # up to the first EOS, which counts
        attention = torch.cat([ids[:, :start] != PAD, mask], dim=1).long()
        with torch.no_grad():
            out = self.trained(ids, attention, mask.shape[1], temperature)
            reference = response_logprobs(self.reference, ids, attention, mask.shape[1], temperature, entropy=False)[0]
            raw = last_position(self.scorer(ids, attention), attention)
        finished = (ids[:, start:] == EOS).any(dim=1)
        penalty, mode = SETTINGS.missing_eos_penalty, SETTINGS.missing_eos_mode
        scores = shape_scores((raw - MEAN) / STD, finished, None, None, penalty, mode)
        return Episodes(ids, attention, mask, out.logprobs, reference, out.values, scores)


def _loaded(model: Any, weights: dict[str, Tensor], prefix: str) -> Any:
    state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.eval()


# ----------------------------------------------------------------------------------------------------- the conventions
@dataclass
class Targets:
    """Rewards, whitened advantages and returns [B,R], and the masks of the two losses."""

    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    mask: Tensor
    value_mask: Tensor


def unbiased(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moments with the variance that TRL takes."""
    mean, var, count = masked_moments(x, mask)
    return mean, var * count / (count - 1)


def targets(e: Episodes, trl_convention: bool, estimator: str = "k1", whiten_rewards: bool = False) -> Targets:
    """Rewards to advantages, by our convention or with the two things that TRL does otherwise.

    TRL's: the episode lasts one position longer, where there is room (the score stands there, and its value counts);
    whitening divides by the unbiased variance.
    """
    kl = torch.where(e.mask, kl_penalty(e.logprobs, e.ref_logprobs, estimator), 0)
    mask = e.longer if trl_convention else e.mask
    rewards = token_rewards(e.scores, kl, mask, SETTINGS.kl_coef)
    if whiten_rewards:
        moments = unbiased(rewards, mask) if trl_convention else None
        rewards = masked_whiten(rewards, mask, shift_mean=False, moments=moments)
    advantages, returns = gae(rewards, e.values, mask, SETTINGS.gamma, SETTINGS.lam)
    moments = unbiased(advantages, e.mask) if trl_convention else None
    return Targets(rewards, masked_whiten(advantages, e.mask, moments=moments), returns, e.mask, mask)


def losses(e: Episodes, t: Targets, new_logprobs: Tensor, new_values: Tensor, rows: Any) -> list[Tensor]:
    """Policy loss, its clip fraction, approxkl, value loss and its clip fraction of some rows."""
    clip, clip_value = SETTINGS.cliprange, SETTINGS.cliprange_value
    policy = policy_loss(new_logprobs, e.logprobs[rows], t.advantages[rows], t.mask[rows], clip)
    value = value_loss(new_values, e.values[rows], t.returns[rows], t.value_mask[rows], clip_value)
    return [*policy, *value]


def backward(models: Models, e: Episodes, t: Targets, parts: list[Any]) -> None:
    """Gradient of the mean over `parts` (lists of rows) of their losses; one part of all rows is the token mean."""
    models.trained.zero_grad()
    for rows in parts:
        out = models.trained(e.input_ids[rows], e.attention_mask[rows], e.length, SETTINGS.temperature)
        policy, _, _, value, _ = losses(e, t, out.logprobs, out.values, rows)
        ((policy + SETTINGS.vf_coef * value) / len(parts)).backward()


def gradient(models: Models, e: Episodes, t: Targets, parts: list[Any]) -> dict[str, Tensor]:
    """`backward`'s gradient by parameter."""
    backward(models, e, t, parts)
    return {name: p.grad.clone() for name, p in models.trained.named_parameters() if p.grad is not None}


def four_epochs(models: Models, e: Episodes, t: Targets) -> dict[str, Tensor]:
    """Weights after as many steps of AdamW as TRL took on the whole batch: without gradient clipping."""
    adam = torch.optim.AdamW(
        models.trained.parameters(), lr=SETTINGS.learning_rate, eps=SETTINGS.adam_eps, weight_decay=0.0
    )
    for _ in range(SETTINGS.num_ppo_epochs):
        backward(models, e, t, [list(range(len(e.scores)))])
        adam.step()
    return {name: p.detach().clone() for name, p in models.trained.named_parameters()}


# ----------------------------------------------------------------------------------------------------------- the report
@dataclass
class Row:
    """One quantity: largest |difference| to TRL by our convention and by TRL's, and what the convention is."""

    quantity: str
    own: float
    adjusted: float
    why: str = ""
    tolerance: float = FLOAT32

    @property
    def agrees(self) -> bool:
        """By TRL's convention."""
        return self.adjusted <= self.tolerance


def apart(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Largest |a - b| where the mask is True."""
    difference = (a.float() - b.float()).abs()
    return float((difference if mask is None else difference[mask]).max())


def run_of(trl: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one run."""
    return {key.removeprefix(f"{name}/"): value for key, value in trl.items() if key.startswith(f"{name}/")}


def tensors_of(trl: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """TRL's gradients or weights by our parameter names."""
    found = {name.removeprefix(prefix): value for name, value in trl.items() if name.startswith(prefix)}
    return {name.replace("value_model.", "critic."): value for name, value in found.items()}


def most_apart(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference over all parameters, which must be the same ones."""
    if mine.keys() != theirs.keys():
        raise ValueError(f"parameters differ: {sorted(mine.keys() ^ theirs.keys())}")
    return max(apart(mine[name], theirs[name]) for name in mine)


def norm(tensors: dict[str, Tensor]) -> Tensor:
    """Global norm."""
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm()


def rollout_rows(models: Models, trl: dict[str, Tensor]) -> list[Row]:
    """Log-probabilities, KL, values and scores of the tokens."""
    exact = models.episodes(trl, SETTINGS.temperature)
    theirs = models.episodes(trl, SETTINGS.temperature + 1e-7)
    mask, longer = exact.mask, exact.longer
    if not torch.equal(mask, ~trl["padding_mask"]):
        raise ValueError("TRL's mask is another one: a pad token was sampled; choose another seed")
    shift = "TRL divides logits by temperature + 1e-7, and writes 1.0 on padding"
    rows = [
        Row(name, apart(getattr(exact, name), trl[name], mask), apart(getattr(theirs, name), trl[name], mask), shift)
        for name in ("logprobs", "ref_logprobs")
    ]
    kl = [apart(kl_penalty(e.logprobs, e.ref_logprobs), trl["kl"], mask) for e in (exact, theirs)]
    rows.append(Row("KL per token, k1", *kl))
    rows.append(Row("values", apart(exact.values, trl["values"], mask), apart(exact.values, trl["values"], longer)))
    score = apart(exact.scores, trl["scores"])
    rows.append(Row("scores, missing EOS subtracted", score, score, "TRL cannot replace a score"))
    return rows


def target_rows(models: Models, trl: dict[str, Tensor], k3: dict[str, Tensor]) -> list[Row]:
    """Rewards, advantages, returns; k3 and whitened rewards from a run of their own."""
    e = models.episodes(trl, SETTINGS.temperature)
    own, theirs = targets(e, False), targets(e, True)
    late = "TRL puts the score one position after the last token where there is room, and keeps that value"
    rows = [
        Row("rewards", apart(own.rewards, trl["rewards"], e.longer), apart(theirs.rewards, trl["rewards"]), late),
        Row("returns", apart(own.returns, trl["returns"], e.mask), apart(theirs.returns, trl["returns"]), late),
        Row(
            "advantages, whitened",
            apart(own.advantages, trl["advantages"], e.mask),
            apart(theirs.advantages, trl["advantages"]),
            "that position, and TRL whitens with the variance over n - 1",
        ),
    ]
    e = models.episodes(k3, SETTINGS.temperature)
    own, theirs = (targets(e, convention, "k3", whiten_rewards=True) for convention in (False, True))
    kl = apart(kl_penalty(e.logprobs, e.ref_logprobs, "k3"), k3["kl"], e.mask)
    rows.append(Row("KL per token, k3", kl, kl))
    rows.append(
        Row(
            "rewards with k3, whitened",
            apart(own.rewards, k3["rewards"], e.longer),
            apart(theirs.rewards, k3["rewards"]),
            "these two",
        )
    )
    return rows


def loss_rows(models: Models, trl: dict[str, Tensor]) -> list[Row]:
    """Losses and statistics of all epochs, on TRL's new log-probabilities and values."""
    e = models.episodes(trl, SETTINGS.temperature)
    names = ("pg_loss", "pg_clipfrac", "approxkl", "vf_loss", "vf_clipfrac")
    results = []
    for t in (targets(e, False), targets(e, True)):
        epochs = []
        for rows, new_logprobs, new_values in zip(trl["rows"], trl["new_logprobs"], trl["new_values"], strict=True):
            epochs.append(torch.stack(losses(e, t, new_logprobs, new_values, rows)))
        results.append(torch.stack(epochs))
    recorded = torch.stack([trl[f"{name}_stats"].flatten() for name in names], dim=1)
    share = e.mask.float().mean()  # of positions that are no padding
    results[1][:, 2] *= share
    late = "other advantages and returns, see above"
    why = {"pg_loss": late, "vf_loss": "other returns, and one more position in the mean", "pg_clipfrac": late}
    why |= {"approxkl": "TRL averages over padding too", "vf_clipfrac": "one more position in the mean"}
    return [
        Row(
            f"{name}, epochs 1 to {len(recorded)}",
            apart(results[0][:, i], recorded[:, i]),
            apart(results[1][:, i], recorded[:, i]),
            why[name],
        )
        for i, name in enumerate(names)
    ]


def gradient_rows(models: Models, trl: dict[str, Tensor], micro: dict[str, Tensor]) -> list[Row]:
    """First gradient, of the whole batch at once and in four micro-batches; weights after four epochs."""
    everything = [list(range(SETTINGS.rollout_batch_size))]
    e = models.episodes(trl, SETTINGS.temperature)
    recorded = tensors_of(trl, "gradient.")
    own, theirs = (gradient(models, e, targets(e, convention), everything) for convention in (False, True))
    rows = [
        Row(
            "first gradient, per parameter",
            most_apart(own, recorded),
            most_apart(theirs, recorded),
            "other advantages and returns",
        ),
        Row("first gradient, norm", apart(norm(own), norm(recorded)), apart(norm(theirs), norm(recorded)), "the same"),
    ]
    e = models.episodes(micro, SETTINGS.temperature)
    recorded = tensors_of(micro, "gradient.")
    own = gradient(models, e, targets(e, True), everything)
    theirs = gradient(models, e, targets(e, True), micro["rows"].tolist())
    why = "TRL averages means of micro-batches: a token in a short one weighs more (all else by its convention)"
    rows.append(Row("first gradient, 4 micro-batches", most_apart(own, recorded), most_apart(theirs, recorded), why))
    return rows


def weight_rows(weights: dict[str, Tensor], trl: dict[str, Tensor]) -> list[Row]:
    """Weights after the four epochs; changes the models that it makes."""
    after = tensors_of(trl, "after.")
    apart_by = []
    for convention in (False, True):
        models = Models(weights)
        e = models.episodes(trl, SETTINGS.temperature)
        apart_by.append(most_apart(four_epochs(models, e, targets(e, convention)), after))
    return [
        Row(
            "weights after 4 epochs",
            *apart_by,
            "other advantages and returns; no gradient clipping on either side, as TRL has none",
            2e-4,
        )
    ]


def step_rows(trl: dict[str, Tensor]) -> list[Row]:
    """Optimizer steps in one epoch: ours, and what TRL's counting makes of them."""
    two, last = (int(trl[f"{name}/optimizer_steps"]) for name in ("two", "last"))
    why_two = "TRL counts micro-batches of the whole rollout: num_mini_batches changes nothing"
    why_last = "on the last batch of a pass over the prompts TRL steps after every micro-batch"
    return [
        Row("optimizer steps, 2 mini-batches", abs(2 - two), abs(1 - two), why_two, 0),
        Row("optimizer steps, 4 micro-batches", abs(1 - last), abs(4 - last), why_last, 0),
    ]


def compare(weights: dict[str, Tensor], trl: dict[str, Tensor]) -> list[Row]:
    """All rows.

    Args:
        weights: of `policy.`, `reference.` and `reward.`, by these prefixes.
        trl: tensors as trl_side.py recorded them, by run and name.
    """
    models = Models(weights)
    whole = run_of(trl, "whole")
    rows = [*rollout_rows(models, whole), *target_rows(models, whole, run_of(trl, "k3")), *loss_rows(models, whole)]
    rows += gradient_rows(models, whole, run_of(trl, "micro"))
    if "whole/after.policy.transformer.wte.weight" in trl:  # not in the fixture: they would double its size
        rows += weight_rows(weights, whole)
    return rows + step_rows(trl)


def in_fixture(run: str, name: str) -> bool:
    """Whether the test-suite needs a tensor. Weights after the update would double the file."""
    kept = KEPT.get(run, ("optimizer_steps",))
    return not name.startswith("after.") if run == "whole" else name.split(".")[0] in kept


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| quantity | our convention | TRL's convention | verdict |", "| --- " * 4 + "|"]
    for row in rows:
        same = row.own <= row.tolerance
        verdict = "agrees" if same else f"differs: {row.why}" if row.agrees else "UNEXPLAINED"
        if same and row.why:
            verdict += f" ({row.why})"
        lines.append(f"| {row.quantity} | {row.own:.1e} | {row.adjusted:.1e} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    """Record, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help="interpreter (a command) with TRL 1.12")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fixture", type=Path, help="write what the test-suite compares with to this file")
    args = parser.parse_args()
    models = random_models(args.seed)
    weights = {f"{name}.{key}": p.detach() for name, model in models.items() for key, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as directory:
        trl = record(models, Path(directory), shlex.split(args.trl_python), args.seed)
    rows = compare(weights, trl)
    print(table(rows))
    if args.fixture:
        kept = {name: value for name, value in trl.items() if in_fixture(*name.split("/"))}
        save_file({name: value.contiguous() for name, value in (kept | weights).items()}, args.fixture)
    if not all(row.agrees for row in rows):
        raise SystemExit("error: a quantity differs from TRL's by more than its conventions explain")


if __name__ == "__main__":
    main()
