"""One run of the `ci` recipe through the real entry points, shared by the integration tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = ("pretrain", "sft", "reward", "ppo", "evaluate")
ROOT = Path(__file__).resolve().parents[2]
# Secrets in the environment of every stage of `ci_run`; test_security.py looks for them in all that was written.
PLANTED = {
    "HF_TOKEN": "hf_PlantedHubTokenPlantedHubToken",
    "WANDB_API_KEY": "planted0wandb0key",
    "OPENAI_API_KEY": "sk-planted-openai-key-planted",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret+access",
    "SOME_SERVICE_TOKEN": "planted-service-token",
    "DB_PASSWORD": "planted-password",
    "HTTPS_PROXY": "http://planted-user:planted-login@proxy.example.org:3128",
}


def run_stage(stage: str, artifacts: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python -m pipelines.<stage> --recipe ci ...` as a user runs it; its output is shown when it fails."""
    command = [sys.executable, "-m", f"pipelines.{stage}", "--recipe", "ci", "--artifacts", str(artifacts), *arguments]
    environment = os.environ | PLANTED | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if check and done.returncode:
        pytest.fail(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-3000:]}")
    return done


@pytest.fixture(scope="session")
def ci_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of all five stages."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    for stage in STAGES:
        done = run_stage(stage, artifacts)
        (artifacts / f"{stage}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    return artifacts / "ci"
