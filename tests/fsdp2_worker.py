"""Run by two processes: an ActorCritic sharded by FSDP2 against the same one whole. Arguments: folder, critic."""

import copy
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import GenerationConfig

from rlhf.errors import UserError
from rlhf.models import ActorCritic, new_reward_model
from rlhf.ppo.build import value_head
from rlhf.ppo.checkpoint import Checkpointer
from rlhf.ppo.generation import PlainGenerator
from rlhf.ppo.rollout import uniforms
from tests.builders import build_model, build_tokenizer
from tests.ppo_toys import lively
from tests.tolerances import assert_close

PROMPTS = [[1, 40 + i, 50 + 3 * i][: 2 + i % 2] for i in range(8)]


def main(folder: Path, critic: str) -> None:
    """Compare forward, gradient and samples."""
    rank = int(os.environ["RANK"])
    policy = lively(build_model(build_tokenizer(), n_layer=2))
    policy.generation_config = GenerationConfig()
    if critic == "separate":
        policy.save_pretrained(folder / str(rank))
        model = ActorCritic(policy, new_reward_model(folder / str(rank), seed=0), None)
    else:
        model = ActorCritic(policy, None, value_head(policy, seed=0))
    dist.init_process_group("gloo")  # only now: with a group, `save_pretrained` writes on rank 0 alone
    whole = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    register_fsdp_forward_method(model, "generate")

    ids = torch.tensor([[0, 1, 40, 60, 61, 2], [1, 41, 42, 63, 2, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    outputs = [part(ids, mask, 3, 0.7) for part in (model, whole)]
    assert_close(outputs[0].logprobs, outputs[1].logprobs)
    assert_close(outputs[0].values, outputs[1].values)
    for out in outputs:
        (out.logprobs.sum() + out.values.square().sum()).backward()
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad.full_tensor(), expected[name].grad, rtol=1e-4, atol=1e-5)

    noise = uniforms(8, 12, 1)
    share = slice(0, 3) if rank == 0 else slice(3, 8)
    sharded = PlainGenerator(model, build_tokenizer(), synced=True).generate(PROMPTS[share], noise[share], 0.7)
    plain = PlainGenerator(whole, build_tokenizer()).generate(PROMPTS[share], noise[share], 0.7)
    assert torch.equal(sharded.response_ids, plain.response_ids)
    assert torch.equal(sharded.response_mask, plain.response_mask)
    check_checkpoint(folder / "checkpoints", model, optimizer)
    dist.destroy_process_group()
    print("sharded equals whole", flush=True)


def check_checkpoint(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Saved, changed and loaded: each rank's shards of weights and moments are bit-equal, and so is the next step.

    The sampling before this has left the root's own weights gathered: the optimizer's are the shards.
    """
    parameters = optimizer.param_groups[0]["params"]

    def step() -> list[torch.Tensor]:
        optimizer.step()
        return [parameter.to_local().clone() for parameter in parameters]

    trainer = SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        model=model,
        optimizer=optimizer,
        parameters=parameters,
        ppo_step=1,
        best=None,
        state_dict=lambda: {"ppo_step": 1, "best": None},
    )
    checkpointer = Checkpointer(directory, trainer.accelerator)
    step()
    checkpointer.save(trainer)
    assert sorted(path.name for path in (directory / "step_000001").iterdir()) == [
        *("checkpoint.json", "rank_00000.pt", "rank_00001.pt", "trainer.json")
    ]
    expected = step()
    optimizer.state.clear()
    assert checkpointer.load(trainer) == {"ppo_step": 1, "best": None}
    found = step()
    assert all(map(torch.equal, found, expected))
    if trainer.accelerator.is_main_process:  # as if four had written it
        sealed = json.loads((directory / "step_000001" / "checkpoint.json").read_text())
        sealed["environment"]["processes"] = 4
        (directory / "step_000001" / "checkpoint.json").write_text(json.dumps(sealed))
    dist.barrier()
    try:
        checkpointer.load(trainer)
    except UserError as error:
        assert "processes 4 -> 2" in str(error)
    else:
        raise AssertionError("shards of four ranks were loaded by two")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
