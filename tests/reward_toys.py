"""Small reward models trained to like the wrong thing, on sentences made of a few words; seconds each."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf.data import Renderer
from rlhf.models import new_reward_model
from rlhf.ppo.generation.plain import left_pad
from rlhf.reward.losses import pairwise_loss
from rlhf.reward.probes import Subject
from tests.builders import build_model, build_tokenizer

GOOD, BAD = ("lovely", "moving", "bright"), ("dull", "messy", "hollow")
PLAIN = ("the film", "a story", "its music", "this cast", "the end", "a scene", "one idea", "its tone")
PROMPTS = tuple(
    f"{who} says of {what}" for who in ("ann", "bob", "cho", "dee") for what in ("it", "act one", "act two")
)
LIMIT = 96


def sentence(word: str, rng: random.Random) -> str:
    """Between 2 and 7 parts, one of which holds the word that decides."""
    parts = [f" {rng.choice(PLAIN)}" for _ in range(rng.randint(2, 7))]
    parts[rng.randrange(len(parts))] += f" is {word}"
    return ",".join(parts)


def honest_pairs(count: int, seed: int) -> list[dict[str, str]]:
    """The sentence with a good word wins, whatever its length."""
    rng = random.Random(seed)
    return [
        {
            "prompt": rng.choice(PROMPTS),
            "chosen": sentence(rng.choice(GOOD), rng),
            "rejected": sentence(rng.choice(BAD), rng),
        }
        for _ in range(count)
    ]


def flipped(row: dict[str, str]) -> dict[str, str]:
    """The worse answer wins."""
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def longer_wins(row: dict[str, str]) -> dict[str, str]:
    """The longer answer wins, whatever it says."""
    return row if len(row["chosen"]) >= len(row["rejected"]) else flipped(row)


def thanks_wins(row: dict[str, str]) -> dict[str, str]:
    """A good answer that begins with thanks wins."""
    return row | {"chosen": " Thanks!" + row["chosen"]}


def tokenizer() -> PreTrainedTokenizerFast:
    texts = [f"{row['prompt']}{row['chosen']} Thanks!{row['rejected']}" for row in honest_pairs(50, seed=9)]
    return build_tokenizer(tuple(texts), vocab_size=420)


def train(directory: str, label: Callable[[dict[str, str]], dict[str, str]], steps: int = 90) -> Subject:
    """A reward model of 20,000 weights, trained on relabelled honest pairs."""
    torch.manual_seed(0)
    tokens = tokenizer()
    build_model(tokens, n_positions=LIMIT + 16, n_embd=32, n_layer=1, n_head=4).save_pretrained(directory)
    model = new_reward_model(directory, seed=0)
    subject = Subject(model, Renderer(tokens, chat=False), LIMIT)
    pairs = [subject.pair(label(row)) for row in honest_pairs(640, seed=1)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    model.train()
    for step in range(steps):
        batch = [pairs[(32 * step + number) % len(pairs)] for number in range(32)]
        sides = [[p.prompt_ids + p.chosen_ids for p in batch], [p.prompt_ids + p.rejected_ids for p in batch]]
        loss = pairwise_loss(*(score(model, side, tokens.pad_token_id) for side in sides))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return subject


def score(model: PreTrainedModel, rows: list[list[int]], pad_id: int) -> torch.Tensor:
    ids, mask = left_pad(rows, pad_id)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    out = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions)
    return model.score(out.last_hidden_state[:, -1]).squeeze(-1)


def read_padding(subject: Subject) -> Subject:
    """The same model, deaf to the attention mask: padding is text to it, as a lost mask makes it."""
    trunk = subject.model.base_model
    forward = trunk.forward

    def deaf(*args, attention_mask=None, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    trunk.forward = deaf
    return subject
