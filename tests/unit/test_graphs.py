"""Where CUDA graphs may be: a graph is given a whole mask, which must say all that attention needs to know."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from rlhf.errors import UserError
from rlhf.graphs import graph_pool
from rlhf.models import explicit_masks, response_logprobs, special_attention

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GPU = SimpleNamespace(distributed_type=DistributedType.NO, device=torch.device("cuda"))


def build(kind, attention, **more):
    torch.manual_seed(0)
    model, config = {
        "llama": (LlamaForCausalLM, LlamaConfig),
        "mistral": (MistralForCausalLM, MistralConfig),
    }[kind]
    return model._from_config(config(**SIZES, **more), attn_implementation=attention).eval()


CASES = {
    "plain": (lambda: build("llama", "sdpa"), None),
    "eager": (lambda: build("llama", "eager"), "its attention is eager, not sdpa"),
    "window": (lambda: build("mistral", "sdpa", sliding_window=4), "layers other than full attention"),
    "no window": (lambda: build("mistral", "sdpa", sliding_window=None), None),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_whole_mask_is_enough_just_where_we_say_so(name):
    make, special = CASES[name]
    model = make()
    found = special_attention(model)
    assert found is None if special is None else special in found
    ids = torch.arange(12).view(1, 12) * 5 % 64
    mask = torch.ones_like(ids)
    plain = response_logprobs(model, ids, mask, 6, 1.0, entropy=False)[0]
    with explicit_masks():
        whole = response_logprobs(model, ids, mask, 6, 1.0, entropy=False)[0]
    assert torch.allclose(plain, whole, atol=1e-5) == (special is None)


@pytest.mark.parametrize("name", CASES)
def test_no_graphs_for_a_model_that_needs_more_than_a_mask(name, monkeypatch):
    monkeypatch.setattr("rlhf.graphs.GraphPool", lambda: "pool")
    make, special = CASES[name]
    parts = [build("llama", "sdpa"), make()]  # the critic's attention counts as well
    assert graph_pool("auto", "ppo", parts, GPU, checkpointing=False) == (None if special else "pool")
    if special:
        with pytest.raises(
            UserError, match=f"ppo.cuda_graphs: on needs a model whose .*{special}.*: set it to auto or off"
        ):
            graph_pool("on", "ppo", parts, GPU, checkpointing=False)


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_graphs_need_one_process_and_no_checkpointing(choice, monkeypatch):
    monkeypatch.setattr("rlhf.graphs.GraphPool", lambda: "pool")
    parts = [build("llama", "sdpa")]
    assert graph_pool(choice, "ppo", parts, GPU, checkpointing=False) == ("pool" if choice == "auto" else None)
    assert graph_pool(choice, "ppo", parts, GPU, checkpointing=True) is None
    many = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, device=GPU.device)
    assert graph_pool(choice, "ppo", parts, many, checkpointing=False) is None
    with pytest.raises(UserError, match="on needs one process on a GPU and no gradient_checkpointing"):
        graph_pool("on", "ppo", parts, many, checkpointing=False)
