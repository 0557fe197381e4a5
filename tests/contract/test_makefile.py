"""What make would run: the launcher of two CPU processes, and what set-up remembers."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def dry(*arguments: str) -> str:
    """The commands that `make -n` prints, without those of the set-up."""
    command = ["make", "-n", "--no-print-directory", "-o", ".venv/.ready", *arguments]  # `make test` is a make, too
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        ("accelerate launch --cpu --num_processes 2", 'cpu.yaml" --num_processes 2 -m pipelines.reward'),
        ("accelerate launch --num_processes 2", "accelerate launch --num_processes 2 -m pipelines.reward"),
        ("accelerate launch --cpu", "accelerate launch --cpu -m pipelines.reward"),
        (
            "accelerate launch --cpu --num_processes 2 --mpirun_hostfile f",
            "accelerate launch --cpu --num_processes 2 --mpirun_hostfile f -m pipelines.reward",
        ),
        ("", "python -m pipelines.reward"),
    ],
)
def test_launcher(launch: str, expected: str) -> None:
    assert expected in dry("reward", f"LAUNCH={launch}")


def test_another_reward_model_and_its_report() -> None:
    assert dry("reward").strip().endswith('-m pipelines.reward --recipe "tiny" --artifacts "artifacts"')
    assert '--as "reward_b"' in dry("reward", "REWARD=reward_b")
    assert dry("report").strip().endswith('-m pipelines.report --recipe "tiny" --artifacts "artifacts"')
    assert dry("report", "RUN=a", "AGAINST=b").split()[-4:] == ["--run", '"a"', "--against", '"b"']
    assert dry("report", "STAGE=reward", "REWARD=reward_b").strip().endswith('--stage "reward" --as "reward_b"')


@pytest.mark.parametrize("name", ['x";touch /tmp/x;"', "$(touch x)", "`x`", "a\\"])
def test_a_name_that_a_shell_would_read_is_refused(name: str) -> None:
    command = ["make", "-n", "--no-print-directory", "-o", ".venv/.ready", "sft", f"RUN={name}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "RUN has one of" in run.stderr and not run.stdout


def test_status_and_data() -> None:
    assert dry("status").strip().endswith('pipelines.status --artifacts "artifacts"')
    assert dry("status", "VERIFY=1").strip().endswith("--verify")
    assert "RECIPE names a data recipe here" not in dry("data", "RECIPE=hh_rlhf")
    command = ["make", "--no-print-directory", "-o", ".venv/.ready", "data"]  # stops before anything is run
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: make data: RECIPE names a data recipe here (RECIPE=")


def test_labels() -> None:
    chosen = dry("label-select", "DATA=mine.yaml", "N=50", "METHOD=mix", "FEATURES=sft", "REWARD=reward reward_b")
    assert '--data "mine.yaml" --count "50" --method "mix" --features "sft"' in chosen
    assert '--reward reward reward_b --recipe "tiny"' in chosen
    assert dry("label", "DATA=mine.yaml").strip().endswith('--data "mine.yaml" --artifacts "artifacts"')
    assert '--port "0"' in dry("label", "DATA=mine.yaml", "PORT=0")


def test_audit_covers_every_pinned_package_and_fails_where_it_cannot_ask() -> None:
    planned = dry("audit", "CONSTRAINTS=gpu.txt", "-o", "gpu.txt")
    assert '-c gpu.txt -e ".[audit]"' in planned
    assert "pip_audit --requirement gpu.txt --no-deps --disable-pip --strict" in planned
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("#") or "==" in line for line in pinned if line)  # else pip-audit refuses the file


def test_set_up_is_remembered_and_redone_when_told_otherwise(tmp_path: Path) -> None:
    saved = tmp_path / "setup.mk"
    saved.write_text("SETUP_CONSTRAINTS := gpu.txt\nSETUP_EXTRAS := tiny\nSETUP_PIP_ARGS := --pre\n")
    (tmp_path / ".ready").touch()
    (tmp_path / "gpu.txt").touch()
    common = ["make", "-n", "-f", str(ROOT / "Makefile"), f"VENV={tmp_path}", "-o", "gpu.txt", "-o", "pyproject.toml"]

    def planned(*extra: str) -> str:
        run = subprocess.run([*common, "setup", *extra], cwd=ROOT, capture_output=True, text=True, check=True)
        return run.stdout

    assert "pip install" not in planned()
    assert "--pre -c gpu.txt" in planned("EXTRAS=dev") and '".[dev]"' in planned("EXTRAS=dev")
