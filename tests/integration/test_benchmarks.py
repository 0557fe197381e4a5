"""Our side of the benchmarks runs, and what they compute from measurements is right. TRL's side needs TRL 1.12."""

import json
import re
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import ablations, cpu, figures, real_model, reward_cv, reward_vs_trl
from benchmarks.our_side import timed_step
from benchmarks.ppo_vs_trl import WORKLOADS, summary, table
from benchmarks.start import random_context, side_specs, with_measured
from benchmarks.trl_learning import at_equal_kl, at_kl, report, seconds_to_reach
from rlhf.errors import UserError
from rlhf.models import load_tokenizer
from rlhf.ppo.stage import build_trainer

CURVE = [{"kl": 0.0, "judge": 0.5}, {"kl": 4.0, "judge": 0.7}, {"kl": 2.0, "judge": 0.6}]


def test_our_side_makes_an_update_of_full_responses_from_random_weights(tmp_path: Path) -> None:
    workload = WORKLOADS["shrunk"]
    ctx = random_context(tmp_path, workload.shape, workload.ppo, ["ppo.total_episodes=8"], 0, torch.float32, "cpu")
    trainer = build_trainer(ctx, load_tokenizer(ctx.inputs["sft"].model_dir))
    row = timed_step(trainer)
    assert trainer.ppo_step == 1
    assert row["seconds"] >= row["generate"] + row["train"] > 0
    assert 0 < row["train_flops"] < row["train"] * row["peak_flops"]
    assert row["dtypes"]["weights"] == row["dtypes"]["adam"] == "float32"
    rollout = trainer.rollout(trainer.prompts.take(range(8)), stream=0, step=1)
    assert bool(rollout.response_mask.all()) and rollout.response_mask.shape == (8, 16)
    specs = side_specs(ctx, {"dtype": "bfloat16"})
    assert specs["trl"]["stop_at_eos"] is False
    assert sorted(specs["trl"]["prompts"]) == sorted(trainer.prompts.ids)
    assert json.loads(json.dumps(specs))["trl"]["ppo"]["response_length"] == 16


def test_medians_leave_the_warm_up_out() -> None:
    common = {
        "generate": 1.0,
        "score": 0.0,
        "train": 1.0,
        "peak_gib": 2.0,
        "dtypes": {"weights": "float32"},
        "train_flops": 3.0,
        "peak_flops": 12.0,
    }
    seconds = {"trl": [90.0, 8.0, 6.0, 40.0], "ours": [50.0, 2.0, 4.0, 1.0]}
    rows = [
        {"side": side, "warmup": number == 0, "seconds": value} | common
        for side, values in seconds.items()
        for number, value in enumerate(values)
    ]
    result = summary(rows, episodes=16)
    assert (result["trl"]["seconds"], result["ours"]["seconds"]) == (8.0, 2.0)
    assert (result["trl"]["episodes_per_second"], result["ours"]["first"]) == (2.0, 50.0)
    assert result["trl"]["roofline"] == result["ours"]["roofline"] == 0.25  # 3 of 12 operations in one second
    assert "4.00 times as fast" in table(result) and "| 25% |" in table(result)


def test_scores_are_compared_where_both_have_the_same_kl() -> None:
    assert at_kl(CURVE, 3.0, "judge") == pytest.approx(0.65)
    trl = [{"kl": 0.0, "judge": 0.5}, {"kl": 8.0, "judge": 0.6}]
    results = [{"side": "ours", "seed": 3, "curve": CURVE}, {"side": "trl", "seed": 3, "curve": trl}]
    (row,) = at_equal_kl([*results, {"side": "ours", "seed": 4, "curve": CURVE}], "judge")
    assert (row["seed"], row["kl"], row["ours"]) == (3, 4.0, 0.7)
    assert row["trl"] == pytest.approx(0.55)
    assert row["along"] == pytest.approx(0.075)  # half of 0.15: both are straight lines from one point


def test_the_report_shows_means_and_spread() -> None:
    names = ("judge", "vader", "reward", "kl", "objective", "length", "eos_rate")
    point = dict.fromkeys(names, 1.0) | {"kl": 0.0}
    results = [
        {"side": side, "seed": seed, "curve": [point, point | {"judge": value, "kl": 4.0}]}
        for side, seed, value in (("ours", 0, 2.0), ("ours", 1, 4.0), ("trl", 0, 1.0))
    ]
    for row, seconds in zip(results, (40.0, 30.0, 80.0), strict=True):
        row["curve"] = [
            point | {"step": step, "seconds": seconds * step} for step, point in zip((0, 1), row["curve"], strict=True)
        ]
    text = report(results)
    assert "seed 0, judge 1.000: TRL 80 s, ours 0 s (0.00)" in text  # as good as SFT, which is ours at the start
    results[2]["curve"][1]["judge"] = 1.5
    assert seconds_to_reach(results, "judge") == [{"seed": 0, "score": 1.5, "ours": 40.0, "trl": 80.0}]
    results[2]["curve"][1]["judge"] = 9.0
    assert seconds_to_reach(results, "judge")[0]["ours"] == float("inf")
    results[2]["curve"][1]["judge"] = 1.0
    text = report(results)
    assert "| ours | 2 | 3.000 ± 1.414 |" in text and "| trl | 1 | 1.000 |" in text
    assert "| 0 | 4.000 | 2.000 | 1.000 | 1.000 | 0.500 |" in text


def test_pairs_made_for_the_reward_benchmark_can_be_told_apart_and_not_by_length() -> None:
    pairs = reward_vs_trl.synthetic_pairs(300, vocab=512, longest=192, seed=0)
    lengths = [len(ids) for ids in pairs["chosen_ids"]]
    assert max(lengths) <= 177 and min(lengths) < 40 and len(set(lengths)) > 60

    def good(ids: list[int]) -> float:
        return sum(token >= 260 for token in ids) / len(ids)

    right = sum(good(pair["chosen_ids"]) > good(pair["rejected_ids"]) for pair in pairs)
    longer = sum(len(pair["chosen_ids"]) > len(pair["rejected_ids"]) for pair in pairs)
    assert 0.75 < right / 300 < 0.95 and 0.4 < longer / 300 < 0.6  # one label in ten is wrong


def test_the_reward_table_shows_medians_and_their_ratio() -> None:
    common = {"padding": 0.25, "peak_gib": None, "first_step": 1.0, "accuracy": 0.5}
    rows = [
        {"side": side, "tokens_per_second": speed, "operations_per_second": speed * 10.0} | common
        for side, speeds in {"trl": (1000.0, 2000.0, 9000.0), "ours": (8000.0, 8000.0, 1.0)}.items()
        for speed in speeds
    ]
    text = reward_vs_trl.table(rows, peak=1e5)
    assert "| trl | 2,000 | 20.0% | 25% | 0.500, 0.500, 0.500 | 1.0 |" in text
    assert "4.00 times as many tokens" in text


def test_what_the_cpu_benchmark_cannot_run_is_said_and_left_out(tmp_path: Path) -> None:
    args = Namespace(run=tmp_path, trl_python=str(tmp_path / "python"), updates=3)
    first, second, third = cpu.commands(args).values()
    assert first == second == f"no {tmp_path}/python: make bench-env"
    assert third[:2] == ["reward_vs_trl", "shrunk"]
    (tmp_path / "python").touch()
    first, second, _ = cpu.commands(args).values()
    assert first == f"no finished run {tmp_path}: make sft reward"
    assert second[:2] == ["ppo_vs_trl", "tiny"] and "--run" not in second


def test_a_measured_command_gives_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.sys, "executable", "echo")
    assert cpu.measure(["reward_vs_trl", "shrunk"], 1) == "-m benchmarks.reward_vs_trl shrunk"


def test_the_table_of_single_settings_is_of_the_figures_that_are_kept() -> None:
    rows = {"a": [dict.fromkeys(ablations.COLUMNS.values(), value) for value in (1.0, 2.0, 3.0)]}
    assert ablations.table(rows).splitlines()[-1] == "| a | 3 |" + " 2.000 ± 1.000 |" * len(ablations.COLUMNS)
    for path, block in ablations.BLOCKS.items():
        kept = json.loads(path.read_text(encoding="utf-8"))["settings"]
        assert set(kept) <= set(ablations.SETTINGS)
        page = ablations.PAGE.read_text(encoding="utf-8")
        assert page == with_measured(page, ablations.table(kept), block), "run `python -m benchmarks.ablations --table`"


def marked(name: str, text: str) -> str:
    return f"<!-- measured{name}: begin -->\n{text}\n<!-- measured{name}: end -->"


def test_each_block_of_a_page_is_written_by_its_name() -> None:
    page = f"head\n{marked('', '1')}\nbetween\n{marked(' b', '2')}\ntail\n"
    assert with_measured(page, "3", "b") == page.replace("\n2\n", "\n3\n")
    assert with_measured(page, "3") == page.replace("\n1\n", "\n3\n")


@pytest.mark.parametrize(
    "page",
    [
        "no block\n",
        marked(" a", "another one"),
        marked(" b", "1") + marked(" b", "2"),
        "<!-- measured b: begin -->\nno end\n",
        "<!-- measured b: end -->\n<!-- measured b: begin -->\n",
    ],
)
def test_a_block_that_is_not_there_once_is_an_error(page: str) -> None:
    with pytest.raises(UserError, match="no block 'measured b', or more than one"):
        with_measured(page, "3", "b")


# ------------------------------------------------------------------------------------------------------ the real model
def real_model_args(tmp_path: Path, *more: str) -> Namespace:
    return real_model.parse(["ci", "--artifacts", str(tmp_path), *more])


def test_the_real_model_passes_every_stage_and_once_more_with_lora(tmp_path: Path) -> None:
    plan = list(real_model.steps(real_model_args(tmp_path, "--set", "reward.split=half_a")))
    stages = ["pretrain", "sft", "reward", "reward_b", "ppo", "evaluate"]
    assert [(step.run, step.name) for step in plan] == [
        *(("ci", name) for name in stages),
        *(("ci-lora", name) for name in ("reward", "ppo", "evaluate")),
    ]
    assert plan[3].command == ["reward", "--as", "reward_b", "reward.split=half_a", "reward.split=half_b"]  # last wins
    assert "peft.r=16" in plan[-1].command and "peft.r=16" not in plan[-4].command
    only = real_model.steps(real_model_args(tmp_path, "--only", "ci-lora", "sft"))
    assert [step.name for step in only] == ["sft", "reward", "ppo", "evaluate"]
    one = real_model.steps(real_model_args(tmp_path, "--only", "ci-lora/ppo", "--lora-set", "peft.r=8"))
    assert [(step.run, step.name, step.command[-1]) for step in one] == [("ci-lora", "ppo", "peft.r=8")]


def test_each_recipe_has_figures_of_its_own() -> None:
    assert real_model.parse([]).out == real_model.parse(["smollm2-harmless"]).out
    other = real_model.parse(["smollm2-helpful-harmless"]).out
    assert other == real_model.RESULTS / "real_model_helpful_harmless.json" and real_model.published(other)
    assert not real_model.published(real_model.parse(["ci"]).out)
    assert not real_model.published(reward_cv.RESULTS)


MEASURED = sorted(real_model.RESULTS.glob("real_model_*.json"))


@pytest.mark.parametrize("kept", MEASURED, ids=lambda path: path.stem)
def test_the_section_of_a_real_model_is_of_the_figures_that_are_kept(kept: Path) -> None:
    page, written = real_model.PAGE.read_text(encoding="utf-8"), real_model.table(json.loads(kept.read_text("utf-8")))
    hint = f"run `python -m benchmarks.real_model --table --out {kept}`"
    assert real_model.published(kept) and page == with_measured(page, written, kept.stem), hint


def test_all_policies_that_were_measured_stand_in_one_table() -> None:
    page, written = real_model.PAGE.read_text(encoding="utf-8"), real_model.overview()
    assert page == with_measured(page, written, "real_model"), "run `python -m benchmarks.real_model --table`"
    kept_runs = [json.loads(kept.read_text(encoding="utf-8"))["runs"] for kept in MEASURED]
    runs = [run for kept in kept_runs for run, summary in kept.items() if "comparison" in summary]
    assert sorted(re.findall(r"^\| `([\w-]+)`", written, re.MULTILINE)) == sorted(runs)
    for run, out in (("smollm2-harmless", "harmless"), ("smollm2-harmless-lora", "harmless_lora")):  # not one row twice
        kept_run = json.loads(real_model.default_out(out).read_text(encoding="utf-8"))["runs"][run]
        row = next(line for line in written.splitlines() if f"`{run}`" in line)
        assert f"| {kept_run['evaluate']['ppo_vs_sft/win_rate_words']:.3f} [" in row
        assert f"| {kept_run['evaluate']['ppo/kl_mean']:.1f} |" in row


@pytest.mark.parametrize("kept", MEASURED, ids=lambda path: path.stem)
def test_pictures_lie_beside_the_figures_of_what_was_measured(tmp_path: Path, kept: Path) -> None:
    runs = json.loads(kept.read_text(encoding="utf-8"))["runs"]
    compared = {run for run, summary in runs.items() if "comparison" in summary}
    without_ppo = {run: {k: v for k, v in summary.items() if k != "ppo"} for run, summary in runs.items()}
    real_model.draw(real_model_args(tmp_path, "--out", str(tmp_path / "figures.json")), {"runs": without_ppo})
    assert {path.name for path in tmp_path.iterdir()} == {f"{run}_frontier.png" for run in compared} != set()
    page = real_model.PAGE.read_text(encoding="utf-8")
    for run in compared:
        for picture in (f"images/{run}_ppo.png", f"images/{run}_frontier.png"):
            assert picture in page and (real_model.PAGE.parent / picture).is_file()


def test_the_learning_curves_of_the_page_are_of_their_files() -> None:
    page = real_model.PAGE.read_text(encoding="utf-8")
    for path in (real_model.ROOT / "results").glob("learning_smollm2*.json"):
        kept = json.loads(path.read_text(encoding="utf-8"))
        assert page == with_measured(page, report(kept["results"]), path.stem)
    kept = json.loads(reward_cv.RESULTS.read_text(encoding="utf-8"))
    assert page == with_measured(page, reward_cv.table(kept), "reward_cv")
    settings = json.loads(reward_cv.SETTINGS.read_text(encoding="utf-8"))
    assert page == with_measured(page, reward_cv.settings_table(settings), "reward_cv_settings")


def test_the_time_of_a_step_that_was_stopped_is_kept_and_nothing_is_run_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([True, False, True])
    monkeypatch.setattr(real_model, "call", lambda *args: next(answers))
    args = real_model_args(tmp_path, "--only", "pretrain", "sft")
    assert not real_model.train(args)  # pretrain is finished, sft was stopped
    assert list(real_model.seconds_spent(args)) == ["ci/pretrain", "ci/sft"]
    assert real_model.add_seconds(args, "ci/sft", 100.0) >= 100.0
    (tmp_path / "ci" / "pretrain").mkdir(parents=True)
    (tmp_path / "ci" / "pretrain" / "manifest.json").touch()
    assert real_model.train(args) and next(answers, None) is None


@pytest.mark.parametrize("gpus", [["0"], ["0", "1", "2"]])
def test_steps_run_side_by_side_as_soon_as_what_they_need_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: list[str]
) -> None:
    made: list[str] = []
    took: set[str] = set()
    args = real_model_args(tmp_path, "--gpus", *gpus)

    def call(args: Namespace, step: real_model.Step, seconds: float, gpu: str) -> bool:
        for path in real_model.needs(args, step):
            assert f"{path.parent.name}/{path.name}" in made
        took.add(gpu)
        time.sleep(0.05)
        made.append(f"{step.run}/{step.name}")
        return True

    monkeypatch.setattr(real_model, "call", call)
    assert real_model.train(args)
    assert made[:2] == ["ci/pretrain", "ci/sft"] and len(set(made)) == len(made) == 9
    assert took == set(gpus)


def test_one_step_that_fails_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(args: Namespace, step: real_model.Step, seconds: float, gpu: str) -> bool:
        if step.name == "sft":
            raise SystemExit("error: exit code 2")
        return True

    monkeypatch.setattr(real_model, "call", call)
    with pytest.raises(SystemExit, match="exit code 2"):
        real_model.train(real_model_args(tmp_path, "--gpus", "0", "1"))


@pytest.mark.parametrize(("ends", "said"), [("143", False), ("0", True), ("2", SystemExit)])
def test_a_stage_is_asked_to_stop_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, said) -> None:
    stage = tmp_path / "stage.sh"
    stage.write_text(f"#!/bin/sh\ntrap 'exit {ends}' TERM\necho began\nwhile :; do sleep 0.05; done\n")
    stage.chmod(0o755)
    monkeypatch.setattr(real_model.sys, "executable", str(stage))
    monkeypatch.setattr(real_model, "STOPS", 0.0)
    args, step = real_model_args(tmp_path), real_model.Step("ci", "sft", ["sft"])
    if said is SystemExit:
        with pytest.raises(SystemExit, match=r"pipelines\.sft.*exit code 2, see .*ci\.log"):
            real_model.call(args, step, 1.0)
    else:
        assert real_model.call(args, step, 1.0) is said
    assert (tmp_path / "ci.log").read_text(encoding="utf-8") == "began\n"


@pytest.mark.parametrize("name", figures.BLOCKS)
def test_figures_in_prose_are_those_of_the_runs(name: str) -> None:
    kept = json.loads(figures.RESULTS.read_text(encoding="utf-8"))
    page = (figures.ROOT / name).read_text(encoding="utf-8")
    assert re.findall(r"<!-- measured ([\w-]+): begin -->", page) == list(figures.BLOCKS[name])
    assert page == figures.rendered(name, kept), "run `python -m benchmarks.figures`"


def test_a_sentence_that_the_figures_do_not_say_is_not_written() -> None:
    kept = json.loads(figures.RESULTS.read_text(encoding="utf-8"))
    kept["tiny"]["comparison"]["metrics"]["ppo/self_bleu"] = 0.0
    with pytest.raises(UserError, match="responses of PPO are more alike"):
        figures.rendered("README.md", kept)
