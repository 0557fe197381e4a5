"""What the vLLM back end asks of TRL's VLLMGeneration and makes of its answers. A stand-in answers: no vLLM here."""

import importlib.machinery
import importlib.util
import inspect
import sys

import pytest
import torch
from trl.generation import vllm_generation

from rlhf.errors import UserError
from rlhf.ppo.generation import vllm as back_end
from tests.ppo_toys import toy_trainer

RESPONSES = [[60, 61, 2], [62, 63, 64, 65], [66, 46, 67]]  # 2 is EOS
LOGPROBS = [[[-0.5], [-1.0], [-0.25]], [[-2.0]] * 4, [[-0.125]] * 3]
TRUE = vllm_generation.VLLMGeneration


class StandIn:
    """Takes what the real class takes, and keeps it."""

    def __init__(self, **kwargs):
        inspect.signature(TRUE.__init__).bind(None, **kwargs)
        self.kwargs, self.calls, self.answer = kwargs, [], (RESPONSES, LOGPROBS)

    def sync_weights(self):
        self.calls.append("sync")

    def generate(self, **kwargs):
        inspect.signature(TRUE.generate).bind(None, **kwargs)
        self.calls.append((kwargs, self.temperature, self.top_p, self.max_completion_length))
        responses, logprobs = self.answer
        return kwargs["prompts"], responses, logprobs, None


def pretend(monkeypatch, spec):
    """Let only the package vllm be found, or not."""
    find = importlib.util.find_spec
    monkeypatch.setattr(back_end.util, "find_spec", lambda name, *args: spec if name == "vllm" else find(name, *args))


@pytest.fixture
def installed(monkeypatch):
    pretend(monkeypatch, importlib.machinery.ModuleSpec("vllm", None))
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", StandIn)


def test_calls_and_answers(tmp_path, installed):
    trainer = toy_trainer(tmp_path, ppo={"generator": "vllm", "vllm_memory": 0.4})
    generator = trainer.generator
    engine = generator.engine
    assert engine.kwargs["model"] is trainer.model.policy and engine.kwargs["mode"] == "colocate"
    assert engine.kwargs["gpu_memory_utilization"] == 0.4
    assert engine.kwargs["max_model_length"] == 24 + 8
    assert engine.kwargs["generation_kwargs"] == {}
    generator.sync()
    prompts = [[1, 40], [1, 41, 42], [1]]
    out = generator.generate(prompts, torch.zeros(3, 4), 0.7, 0.9)
    asked = {"prompts": prompts, "images": None, "num_generations": 1}
    assert engine.calls == ["sync", (asked, 0.7, 0.9, 4)]
    assert out.response_ids.tolist() == [[60, 61, 2, 0], [62, 63, 64, 65], [66, 46, 67, 0]]
    assert out.response_mask.sum(1).tolist() == [3, 4, 3]
    assert out.finished.tolist() == [True, False, False]
    assert out.logprobs.tolist() == [[-0.5, -1.0, -0.25, 0.0], [-2.0] * 4, [-0.125] * 3 + [0.0]]


def test_a_stop_string_ends_a_response(tmp_path, installed):
    generator = toy_trainer(tmp_path, ppo={"generator": "vllm", "stop_strings": ["."]}).generator
    assert generator.engine.kwargs["generation_kwargs"] == {"stop": ["."], "include_stop_str_in_output": True}
    dot = generator.tokenizer(".", add_special_tokens=False)["input_ids"]
    generator.engine.answer = ([[60, 61], [60, *dot]], [[[-1.0]] * 2] * 2)
    out = generator.generate([[1], [1]], torch.zeros(2, 2), 1.0)
    assert out.finished.tolist() == [False, True]


def test_without_vllm_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    pretend(monkeypatch, None)
    with pytest.raises(UserError, match=r"^ppo\.generator vllm: vLLM is not installed: .*set ppo\.generator: auto$"):
        toy_trainer(tmp_path, ppo={"generator": "vllm"})


def test_lora_is_refused(tmp_path, installed):
    with pytest.raises(UserError, match="full weights"):
        toy_trainer(tmp_path, "lora-shared", ppo={"generator": "vllm"})
