"""Does PPO reach the optimum that can be written down?

With gamma = 1 the KL-regularised objective J(pi) = E_pi[r] - kl_coef KL(pi || ref) has a known maximum:
pi*(y|x) proportional to ref(y|x) exp(r(x,y) / kl_coef). On a vocabulary of 12 tokens and responses of at most 3 every
response can be enumerated, so the distance of a trained policy from pi* is a sum and not an estimate. Training is the
real thing: the ppo stage's own trainer, from an SFT artifact on disk. The table goes to stdout, progress to stderr.

    python -m benchmarks.optimum             # the table of docs/ppo.md
    python -m benchmarks.optimum --quick     # one row of it, for the impatient
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf.ppo import stage as ppo_stage
from rlhf.ppo.advantages import kl_penalty
from rlhf.ppo.trainer import PPOTrainer
from rlhf.stage import StageContext, load_inputs
from tests.builders import EOS, PAD, build_model, build_recipe, build_sft_artifact, write_data_recipe, write_rows
from tests.ppo_toys import SHAPES, trainer_of

LETTERS = "abcdefghij"
LENGTH = 3  # response tokens, EOS included
PROMPTS = ["a", "cb", "dac", "efd"]
PEFT = {"r": 16, "lora_alpha": 32}
SETTINGS = {
    "rewards": [{"function": "benchmarks.optimum:rule"}],
    "response_length": LENGTH,
    "rollout_batch_size": 512,
    "mini_batch_size": 512,
    "num_ppo_epochs": 4,
    "max_tokens_per_micro_batch": 8192,
    "temperature": 1.0,
    "warmup_ratio": 0.3,  # a large first update forgets responses that are then too rare to be found again
    "vf_coef": 0.5,  # values as large as here are learned sooner so, and without the clip
    "cliprange_value": None,
    "missing_eos_penalty": None,  # a response that is cut is a response like any other
    "best_metric": None,
}
RATES = {"full": {"learning_rate": 2e-3}, "lora": {"learning_rate": 4e-3}}  # falling to 0, as in every run


# --------------------------------------------------------------------------------------------------------- the problem
def _random(*shape: int, seed: int) -> list:
    return (0.7 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).tolist()


SINGLE = _random(len(LETTERS), LENGTH, len(LETTERS), seed=1)  # [last letter of the prompt][place][letter]
PAIR = _random(len(LETTERS), len(LETTERS), seed=2)  # [letter][next letter]


def rule(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward: fixed random numbers for each letter at each place (other ones for another prompt) and each pair."""

    def one(prompt: str, response: str) -> float:
        single, y = SINGLE[LETTERS.index(prompt[-1])], [LETTERS.index(letter) for letter in response]
        return sum(single[t][token] for t, token in enumerate(y)) + sum(PAIR[a][b] for a, b in itertools.pairwise(y))

    return [one(*texts) for texts in zip(prompts, responses, strict=True)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Pad, EOS and one token per letter. The policy may sample pad, too: it then is a token without a letter."""
    vocabulary = {token: number for number, token in enumerate([PAD, EOS, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, padding_side="left")


def build_trainer(root: Path, shape: str, ppo: dict, prompts: Sequence[str] = PROMPTS) -> PPOTrainer:
    """The ppo stage's trainer for the problem above, from artifacts below `root`."""
    tokenizer = build_tokenizer()
    size = {"n_embd": 64, "activation_function": "relu", "tie_word_embeddings": False}
    model = build_model(tokenizer, initializer_range=0.1, **size)
    with torch.no_grad():  # LoRA leaves the output embedding as it is: it must be large enough to reach pi*
        model.lm_head.weight *= 2
    build_sft_artifact(root, tokenizer=tokenizer, model=model)
    (root / "data").mkdir()
    split = {"by": "row", "rows": {"train": len(prompts)}}
    data = write_data_recipe(root / "data", rows=len(prompts), split=split)
    write_rows(root / "data" / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    weights, critic = shape.split("-")
    settings = SETTINGS | {"data": str(data), "critic": critic} | ppo
    recipe = build_recipe(root, ppo=settings, peft=PEFT if weights == "lora" else None)
    ctx = StageContext(ppo_stage.STAGE, recipe, root, "toy")
    load_inputs(ctx)
    ctx.dir.mkdir(parents=True)
    return trainer_of(ctx)


# ------------------------------------------------------------------------------------------------------- exact numbers
@dataclass
class Exact:
    """Everything about all responses of all prompts, float64.

    P prompts, V tokens, N = V^3 responses. What follows an EOS counts for nothing: there every policy is uniform and
    the reward does not look, so that the responses fill a cube.

    Attributes:
        logprobs, reference: [P,N,3] per token. rewards: [P,N].
    """

    logprobs: Tensor
    reference: Tensor
    rewards: Tensor


@torch.no_grad()
def enumerate_exactly(trainer: PPOTrainer) -> Exact:
    """Log-probabilities and rewards of every response, by the forwards and the reward function of the trainer."""
    tokenizer = trainer.generator.tokenizer
    eos, size = tokenizer.eos_token_id, len(tokenizer)
    responses = torch.cartesian_prod(*[torch.arange(size)] * LENGTH)
    counts = torch.cumsum(responses == eos, 1) - (responses == eos).long() == 0  # until the first EOS, included
    texts = [trainer.decode(row.tolist()) for row in responses]
    parts = []
    for prompt, text in zip(trainer.prompts.ids, trainer.prompts.texts, strict=True):
        ids = torch.cat([torch.tensor(prompt).expand(len(responses), -1), responses], dim=1)
        mask = torch.ones_like(ids)
        policy = trainer.model(ids, mask, LENGTH, trainer.config.temperature).logprobs
        both = torch.stack([policy, trainer.reference(ids, mask, LENGTH)]).double()
        scores = torch.tensor(trainer.rewards[0].function([text] * len(texts), texts), dtype=torch.float64)
        parts.append((*torch.where(counts, both, -torch.tensor(size).log()), scores))
    exact = Exact(*(torch.stack(part) for part in zip(*parts, strict=True)))
    for logprobs in (exact.logprobs, exact.reference):  # nothing is missing, nothing is counted twice
        assert torch.allclose(logprobs.sum(-1).exp().sum(-1), torch.tensor(1.0, dtype=torch.float64), atol=1e-4)
    return exact


def optimum(exact: Exact, kl_coef: float) -> Tensor:
    """log pi* [P,N]."""
    return (exact.reference.sum(-1) + exact.rewards / kl_coef).log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of log-probabilities [P,N], nats, mean over prompts."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def objective(logprobs: Tensor, exact: Exact, kl_coef: float) -> float:
    """J, mean over prompts."""
    return float((logprobs.exp() * exact.rewards).sum(-1).mean()) - kl_coef * kl(logprobs, exact.reference.sum(-1))


def gain(exact: Exact, kl_coef: float) -> float:
    """Share of the achievable gain: (J(pi) - J(ref)) / (J(pi*) - J(ref))."""
    policies = (exact.logprobs.sum(-1), exact.reference.sum(-1), optimum(exact, kl_coef))
    reached, start, best = (objective(policy, exact, kl_coef) for policy in policies)
    return (reached - start) / (best - start)


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation, 0 (same) to 1 (disjoint), of log-probabilities [P,N]; mean over prompts."""
    return 0.5 * float((p.exp() - q.exp()).abs().sum(-1).mean())


def lost(policy: Tensor, best: Tensor) -> float:
    """Probability under pi* of the responses that `policy` gives less than a thousandth of that."""
    return float(torch.where(policy < best - math.log(1000), best.exp(), 0).sum(-1).mean())


def destination(exact: Exact, kl_coef: float, estimator: str, rate: float = 0.1, steps: int = 4000) -> Tensor:
    """Where the expected update leads from the reference if nothing is sampled and no network generalises, [P,N].

    A table of log-probabilities per state follows log pi(a|s) += rate (Q(s,a) - kl_coef c(a)), where c is the penalty
    of the estimator and Q the expected reward and penalty of the tokens after a: the policy gradient with the penalty
    taken as a constant, as PPO takes it. It rests where Q - kl_coef c is the same for all tokens that are left. For k1
    that is pi*. k2 and k3 have many such resting places, one for each choice of tokens that are left, and a sampled run
    may end in another. A token e^12 times rarer than under the reference is never sampled again: its penalty ends.
    """
    prompts, size = len(exact.rewards), round(exact.rewards.shape[1] ** (1 / LENGTH))
    cube = exact.reference.view(prompts, *[size] * LENGTH, LENGTH)
    reference = [cube[:, :, :1, :1, 0], cube[:, :, :, :1, 1], cube[..., 2]]
    policy = list(reference)
    for _ in range(steps):
        ahead = exact.rewards.view(prompts, *[size] * LENGTH)
        for t in reversed(range(LENGTH)):
            alive = policy[t] - reference[t] > -12
            value = torch.where(alive, ahead - kl_coef * kl_penalty(policy[t], reference[t], estimator), 0)
            ahead = (policy[t].exp() * value).sum(t + 1, keepdim=True)
            moved = torch.where(alive, policy[t] + rate * (value - ahead), -torch.inf).log_softmax(t + 1)
            policy[t] = moved.maximum(reference[t] - 12)
    return sum(policy).flatten(1)


# --------------------------------------------------------------------------------------------------------------- table
def run(shape: str, ppo: dict, prompts: Sequence[str] = PROMPTS) -> Exact:
    """Train once; the exact numbers of the policy that comes out."""
    with tempfile.TemporaryDirectory() as root:
        trainer = build_trainer(Path(root), shape, RATES[shape.split("-")[0]] | ppo, prompts)
        trainer.train()
        return enumerate_exactly(trainer)


COLUMNS = (
    "weights, critic",
    "penalty",
    "kl_coef",
    "share of the gain",
    "share by exact update",
    "KL(pi, pi*)",
    "KL(pi, ref); of pi*",
    "lost",
)


def row(shape: str, kl_coef: float, estimator: str, found: list[Exact]) -> str:
    """One line of the table: means over seeds, and the lowest share of the gain."""
    best, target = optimum(found[0], kl_coef), destination(found[0], kl_coef, estimator)
    policies = [exact.logprobs.sum(-1) for exact in found]
    gains = [gain(exact, kl_coef) for exact in found]
    reference = found[0].reference.sum(-1)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    lowest = f" (lowest {min(gains):.1%})" if len(gains) > 1 else ""
    cells = [
        shape.replace("-", ", "),
        estimator,
        f"{kl_coef}",
        f"{mean(gains):.1%}{lowest}",
        f"{gain(Exact(target[..., None], found[0].reference, found[0].rewards), kl_coef):.1%}",
        f"{mean([kl(policy, best) for policy in policies]):.3f}",
        f"{mean([kl(policy, reference) for policy in policies]):.2f}; {kl(best, reference):.2f}",
        f"{mean([lost(policy, best) for policy in policies]):.1%}",
    ]
    return line(cells)


def line(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table as Markdown, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("overrides", nargs="*", help="of the ppo section, such as critic_warmup_steps=10")
    parser.add_argument("--kl-coefs", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--estimators", nargs="+", default=["k1", "k2", "k3"], choices=["k1", "k2", "k3"])
    parser.add_argument("--seeds", type=int, default=1, help="runs per row")
    parser.add_argument("--steps", type=int, default=160, help="ppo_steps of 512 episodes")
    parser.add_argument("--quick", action="store_true", help="the first row only")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    changes = {name: yaml.safe_load(value) for name, value in (item.split("=", 1) for item in arguments.overrides)}
    shapes = {"k1": SHAPES, "k2": ("full-shared",), "k3": ("full-shared",)}
    kinds = itertools.product(arguments.estimators, arguments.kl_coefs)
    rows = [(shape, kl_coef, estimator) for estimator, kl_coef in kinds for shape in shapes[estimator]]
    print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n", flush=True)
    for setting in rows[:1] if arguments.quick else rows:
        shape, kl_coef, estimator = setting
        ppo = {"kl_coef": kl_coef, "kl_estimator": estimator, "total_episodes": arguments.steps * 512} | changes
        found = [run(shape, ppo | {"seed": seed}) for seed in range(arguments.seeds)]
        print(row(*setting, found), flush=True)
    print(f"\n{time.process_time() / 60:.1f} minutes of CPU time")


if __name__ == "__main__":
    main()
