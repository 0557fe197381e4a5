"""A run directory written by hand: small numbers that are known, and no models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.evaluation.compare import PolicySamples, compare
from rlhf.recipe import load_recipe

PLANTED = "</script><img src=x onerror=\"document.title='broken in'\"><script>document.title='broken in'</script>"
CHINESE = "这部电影很好看，值得再看一遍。"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_stage(run: Path, stage: str, *, inputs: dict[str, str], **changes: Any) -> Path:
    """A manifest of a stage with hash `<stage>-hash`; `changes` replace its entries."""
    folder = run / stage
    folder.mkdir(parents=True)
    recipe = changes.pop("recipe", None) or load_recipe("ci").model_dump(mode="json")
    manifest = {
        "schema_version": 1, "stage": stage, "run": run.name, "status": "complete", "recipe": recipe, "inputs": inputs,
        "data": {"reviews": {"fingerprint": "d1d2d3d4d5d6d7d8"}}, "seed": 0, "git_commit": "abcdef0123456789",
        "hardware": {"cpus": 2, "gpus": []}, "finished": "2026-01-02T03:04:05+00:00", "wall_seconds": 125.4,
        "peak_memory_gib": 1.25, "metrics": {}, "payload_hash": f"{stage}-hash", "files": {},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest | changes), encoding="utf-8")
    return folder


def sample(step: int, prompt: str, tokens: list[str], score: float, **changes: Any) -> dict[str, Any]:
    count = len(tokens)
    numbers = {"token_kl": [0.5 * step] * count, "token_value": [-1.0] * count, "token_reward": [0.0] * count}
    row = {"step": step, "kind": "fixed", "prompt": prompt, "response": "".join(tokens), "score": score, "kl": 1.5}
    return row | {"length": count, "has_eos": True, "tokens": tokens} | numbers | changes


def build_run(
    root: Path, name: str = "toy", kl_coef: float = 0.1, stages: tuple[str, ...] = ("sft", "ppo", "evaluate")
):
    """Folder of a run with the given stages: PPO of four steps whose KL alert fires at steps 3 and 4."""
    run, recipe = root / name, load_recipe("ci", [f"ppo.kl_coef={kl_coef}"]).model_dump(mode="json")
    if "sft" in stages:
        folder = write_stage(run, "sft", inputs={}, recipe=recipe)
        write_jsonl(folder / "metrics.jsonl", [{"step": 10, "loss": 5.5}, {"step": 20, "loss": 5.25}])
    if "ppo" in stages:
        metrics = {"objective/scores": 2.5, "objective/kl": 8.125, "published_ppo_step": 4}
        folder = write_stage(
            run, "ppo", inputs={"sft": "sft-hash"}, recipe=recipe, metrics=metrics, alerts={"kl": 3}, stopped=""
        )
        rows = [
            {"ppo_step": step, "objective/scores": 0.5 * step, "objective/kl": 2.0 * step, "alerts/kl": int(step > 2)}
            for step in (1, 2, 3, 4)
        ]
        rows[3] |= {"eval/scores": 1.75, "loss/policy_avg": None}
        write_jsonl(folder / "metrics.jsonl", rows)
        write_jsonl(
            folder / "samples.jsonl",
            [
                sample(0, "a film", [" good", ".", ""], 0.5),
                sample(0, PLANTED, [PLANTED], -1.0),
                sample(0, "电影", [CHINESE], 0.0),
                sample(4, "a film", [" great", " great", ""], 2.5),
                sample(4, PLANTED, ["bad"], -2.0, has_eos=False),
                sample(4, "电影", [CHINESE, "好"], 1.0),
            ],
        )
    if "evaluate" in stages:
        _evaluate(run, recipe)
    return run


def _evaluate(run: Path, recipe: dict[str, Any]) -> None:
    prompts = [f"prompt {n}" for n in range(30)]
    policies = [
        PolicySamples(
            name, prompts, [f"{name} {n}" for n in range(30)], [2] * 30, [True] * 30, [kl] * 30, {"judge": score}
        )
        for name, kl, score in (("sft", 0.0, [0.25] * 30), ("ppo", 8.0, [0.75] * 15 + [0.0] * 15))
    ]
    comparison = compare(policies, num_resamples=100)
    inputs = {"sft": "sft-hash", "ppo": "another-hash"}  # PPO was redone since: stale
    folder = write_stage(run, "evaluate", inputs=inputs, recipe=recipe, comparison=comparison)
    rows = [
        {"policy": p.name, "prompt": p.prompts[n], "response": p.responses[n], "kl": p.kl[n], "length": 2}
        | {"scores": {"judge": p.scores["judge"][n]}, "has_eos": True}
        for p in policies
        for n in range(30)
    ]  # fmt: skip
    write_jsonl(folder / "samples.jsonl", rows)
