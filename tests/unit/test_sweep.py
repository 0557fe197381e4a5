"""Sweeps: which runs, what they share, and the table, against numbers worked out by hand."""

import json
import shutil
import sys

import pytest

from pipelines import sweep
from rlhf.artifacts import finish, publish
from rlhf.errors import UserError
from rlhf.evaluation.sweeps import markdown, points, run_name, table


def finished(root, run, stage, metrics, weights="first"):
    folder = root / run / f"{stage}.partial"
    folder.mkdir(parents=True)
    (folder / "weights.txt").write_text(f"{run} {stage} {weights}", encoding="utf-8")
    manifest = {"stage": stage, "run": run, "status": "complete", "inputs": {}, "metrics": metrics}
    finish(folder, manifest)
    publish(folder, root / run / stage)


def test_every_combination_the_last_key_fastest():
    found = points(["ppo.kl_coef=0.1,0.2", "seed=0,1"])
    assert found == [
        {"ppo.kl_coef": "0.1", "seed": "0"},
        {"ppo.kl_coef": "0.1", "seed": "1"},
        {"ppo.kl_coef": "0.2", "seed": "0"},
        {"ppo.kl_coef": "0.2", "seed": "1"},
    ]
    assert run_name("tiny", found[3]) == "tiny-kl_coef_0.2-seed_1"


@pytest.mark.parametrize("over", ["ppo.kl_coef", "=1", "ppo.kl_coef=", "ppo.kl_coef=1,,2"])
def test_what_is_no_list_of_values(over):
    with pytest.raises(UserError, match=r"not of the form section\.key=a,b,c"):
        points([over])
    with pytest.raises(UserError, match="given twice"):
        points(["seed=1", "seed=2"])


def test_the_table_is_the_mean_over_seeds(tmp_path):
    over = points(["ppo.kl_coef=0.1,0.2", "seed=0,1,2"])
    for point, reward in zip(over, [1.0, 2.0, 3.0, 5.0], strict=False):  # the last two are not finished
        metrics = {"ppo/reward_mean": reward, "ppo/reward_mean_low": 0.0, "ppo/eos_rate": 1.0, "sft/length_mean": 7.0}
        finished(tmp_path, run_name("tiny", point), "evaluate", metrics)
    rows = table(tmp_path, "tiny", over, "evaluate")
    assert rows == [
        ["ppo.kl_coef", "runs", "ppo/reward_mean", "ppo/eos_rate"],
        ["0.1", "3", "2 ± 1", "1 ± 0"],
        ["0.2", "1", "5", "1"],
    ]
    assert table(tmp_path, "tiny", over, "evaluate", ["sft/length_mean"])[1] == ["0.1", "3", "7 ± 0"]
    assert markdown(rows).splitlines()[1] == "| --- | --- | --- | --- |"
    with pytest.raises(UserError, match="--metrics ppo/x: the evaluate stage has no such metric, it has ppo/eos_rate"):
        table(tmp_path, "tiny", over, "evaluate", ["ppo/x"])
    with pytest.raises(UserError, match="no finished ppo stage of 6 runs"):
        table(tmp_path, "tiny", over, "ppo")


@pytest.mark.parametrize("key", ["ppo.seed", "evaluate.seed"])
def test_the_seed_of_one_stage_is_a_seed(tmp_path, key):
    over = points(["ppo.kl_coef=0.1", f"{key}=0,1,2"])
    for point, reward in zip(over, [1.0, 2.0, 3.0], strict=True):
        finished(tmp_path, run_name("tiny", point), "evaluate", {"ppo/reward_mean": reward})
    rows = table(tmp_path, "tiny", over, "evaluate")
    assert rows == [["ppo.kl_coef", "runs", "ppo/reward_mean"], ["0.1", "3", "2 ± 1"]]


def test_the_head_of_a_table_names_its_seeds(tmp_path, capsys):
    for stage in ("sft", "reward"):
        finished(tmp_path, "ci", stage, {})
    for over, head in (("ppo.seed=0,1", "deviation over ppo.seed:\n"), ("ppo.kl_coef=0.1,0.2", "\n| ppo.kl_coef")):
        for point in points([over]):
            finished(tmp_path, run_name("ci", point), "evaluate", {"ppo/eos_rate": 1.0})
        command = ["--recipe", "ci", "--artifacts", str(tmp_path), "--over", over, "--table-only"]
        assert sweep.main(command) == 0
        shown = capsys.readouterr().out
        assert head in shown and "over seed" not in shown


def test_stages_that_are_not_run_are_those_of_the_base_run(tmp_path):
    finished(tmp_path, "tiny", "sft", {})
    finished(tmp_path, "tiny", "ppo", {})
    finished(tmp_path, "tiny", "reward", {})
    (tmp_path / "tiny" / "reward").rename(tmp_path / "tiny" / "reward_b")  # the model that judges
    shutil.copytree(tmp_path / "tiny" / "sft", tmp_path / "tiny" / "sft.old")
    (tmp_path / "other").mkdir()
    for _ in range(2):  # again: nothing to do
        sweep.share(tmp_path / "tiny", tmp_path / "other", ["ppo", "evaluate"])
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["reward_b", "sft"]
    (tmp_path / "third").mkdir()
    sweep.share(tmp_path / "tiny", tmp_path / "third", ["reward", "ppo", "evaluate"])  # a reward model of its own seed
    assert sorted(path.name for path in (tmp_path / "third").iterdir()) == ["sft"]
    assert (tmp_path / "tiny/sft/weights.txt").samefile(tmp_path / "other/sft/weights.txt")


def test_each_run_gets_its_values_and_a_failure_stops_the_sweep(tmp_path, capfd, monkeypatch):
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(3 if 'ppo.kl_coef=0.2' in sys.argv else 0)\n",
        encoding="utf-8",
    )
    arguments = ["--recipe", "ci", "--artifacts", str(tmp_path), "--launch", f"{sys.executable} {fake}"]
    assert sweep.main([*arguments, "--over", "ppo.kl_coef=0.1,0.2"]) == 2
    assert "--base ci: no finished sft in" in capfd.readouterr().err and not list(tmp_path.glob("ci*"))
    for stage in ("sft", "reward"):
        finished(tmp_path, "ci", stage, {})
    assert sweep.main([*arguments, "--over", "ppo.kl_coeff=0.1,0.2"]) == 2
    assert "kl_coef" in capfd.readouterr().err and len(list(tmp_path.glob("ci*"))) == 1
    assert sweep.main([*arguments, "--over", "seed=0", "--csv", str(tmp_path / "no" / "x.csv")]) == 2
    assert "no such folder" in capfd.readouterr().err
    code = sweep.main([*arguments, "--over", "ppo.kl_coef=0.1,0.2,0.3", "--set", "ppo.gamma=0.9"])
    called = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("[")]
    common = ["--recipe", "ci", "--artifacts", str(tmp_path), "--run"]
    first = [*common, "ci-kl_coef_0.1", "ppo.gamma=0.9", "ppo.kl_coef=0.1"]
    assert called[0] == ["-m", "pipelines.ppo", *first] and called[1] == ["-m", "pipelines.evaluate", *first]
    assert code == 3 and len(called) == 3 and called[2][-1] == "ppo.kl_coef=0.2"
    assert sweep.main([*arguments, "--over", "ppo.reference=a/b,ab"]) == 2
    assert "two combinations make the same name" in capfd.readouterr().err
    assert sweep.main([*arguments, "--over", "sft.seed=1,2"]) == 2
    assert capfd.readouterr().err == "error: --over sft.seed: stage sft is not run: add it to --stages\n"


def test_runs_on_another_reward_model_are_not_compared(tmp_path, capfd):
    over = ["ppo.kl_coef=0.1,0.2"]
    for stage in ("sft", "reward"):
        finished(tmp_path, "ci", stage, {})
    for point in points(over):
        name = run_name("ci", point)
        finished(tmp_path, name, "evaluate", {"ppo/eos_rate": 1.0})
        sweep.share(tmp_path / "ci", tmp_path / name, ["ppo", "evaluate"])
    command = ["--recipe", "ci", "--artifacts", str(tmp_path), "--over", *over, "--table-only"]
    assert sweep.main(command) == 0 and "ppo/eos_rate" in capfd.readouterr().out
    shutil.rmtree(tmp_path / "ci" / "reward")
    finished(tmp_path, "ci", "reward", {}, "trained again")
    assert sweep.main(command) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: sweep: {tmp_path}/ci-kl_coef_0.1/reward is not the reward of ci, which was made")
    assert error.count("\n") == 1
