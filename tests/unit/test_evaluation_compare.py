"""Comparison, table, report and picture, with numbers small enough to check by hand."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from rlhf.errors import UserError
from rlhf.evaluation import report
from rlhf.evaluation.compare import PolicySamples, compare, compare_parts

SFT = PolicySamples(
    name="sft",
    prompts=["p1", "p2", "p3", "p4"],
    responses=["a b c", "a b d", "a b e", "a b f"],
    lengths=[3, 3, 4, 4],
    has_eos=[True, True, False, True],
    kl=[0.0, 0.0, 0.0, 0.0],
    scores={"reward": [0.0, 1.0, 2.0, 3.0], "judge": [0.5, 0.5, 0.5, 0.5]},
)
PPO = PolicySamples(
    name="ppo",
    prompts=["p1", "p2", "p3", "p4"],
    responses=["a b", "a b", "a b", "a c"],
    lengths=[2, 2, 2, 2],
    has_eos=[True, True, True, True],
    kl=[2.0, 4.0, 6.0, 8.0],
    scores={"reward": [1.0, 2.0, 3.0, 4.0], "judge": [0.9, 0.5, 0.7, 0.1]},
)


def test_typed_metrics():
    result = compare([SFT, PPO])
    expected = {
        "sft/reward_mean": 1.5,
        "ppo/reward_mean": 2.5,
        "sft/judge_mean": 0.5,
        "ppo/judge_mean": 0.55,
        "sft/kl_mean": 0.0,
        "ppo/kl_mean": 5.0,
        "sft/length_mean": 3.5,
        "ppo/length_mean": 2.0,
        "sft/eos_rate": 0.75,
        "ppo/eos_rate": 1.0,
        "sft/distinct_2": 5 / 8,
        "ppo/distinct_2": 2 / 4,
        "ppo_vs_sft/win_rate_reward": 1.0,
        "ppo_vs_sft/win_rate_judge": (1 + 0.5 + 1 + 0) / 4,
        "ppo_vs_sft/reward_delta": 1.0,
        "ppo_vs_sft/judge_delta": 0.05,
        "ppo_vs_sft/kl_delta": 5.0,
        "ppo_vs_sft/length_delta": -1.5,
        "ppo_vs_sft/eos_rate_delta": 0.25,
        "ppo_vs_sft/distinct_2_ratio": 0.8,
    }
    assert {key: result["metrics"][key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert result["policies"] == ["sft", "ppo"]
    assert (result["num_responses"], result["num_prompts"]) == (4, 4)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_what_ppo_maximises_is_compared_where_it_is_known():
    sft = dataclasses.replace(SFT, rlhf_reward=[0.0, 1.0, -2.0, 3.0])
    ppo = dataclasses.replace(PPO, rlhf_reward=[0.5, 1.0, 1.5, 2.0])
    result = compare([sft, ppo])
    assert result["metrics"]["sft/rlhf_reward_mean"] == 0.5 and result["metrics"]["ppo/rlhf_reward_mean"] == 1.25
    assert result["metrics"]["ppo_vs_sft/rlhf_reward_delta"] == 0.75
    (row,) = [row for row in report.comparison_rows(result) if row[0].startswith("rlhf_reward")]
    assert [cell.split()[0] for cell in row[1:]] == ["0.500", "1.250", "+0.750"]
    unknown = compare([sft, PPO])  # of a model with other tokens
    assert "ppo_vs_sft/rlhf_reward_delta" not in unknown["metrics"]
    assert not any(row[0].startswith("rlhf_reward") for row in report.comparison_rows(compare([SFT, PPO])))
    with pytest.raises(UserError, match="rlhf_reward has 1 entries for 4 prompts"):
        compare([sft, dataclasses.replace(PPO, rlhf_reward=[1.0])])


def test_parts_of_a_mixture_are_compared_each_alone():
    refusing = dataclasses.replace(PPO, responses=["a b", "I'm sorry, but I can't help.", "I cannot help you.", "a c"])
    parts = compare_parts([SFT, refusing], ["help", "harm", "help", "help"])
    assert [(part["part"], part["num_responses"]) for part in parts] == [("help", 3), ("harm", 1)]
    helped, harmful = (part["metrics"] for part in parts)
    assert (helped["sft/refusal_rate"], harmful["ppo/refusal_rate"]) == (0.0, 1.0)
    assert helped["ppo/refusal_rate"] == pytest.approx(1 / 3) and helped["sft/length_mean"] == pytest.approx(11 / 3)
    assert helped["ppo_vs_sft/win_rate_judge"] == pytest.approx(2 / 3)
    assert helped["ppo_vs_sft/win_rate_judge_low"] < 2 / 3 < helped["ppo_vs_sft/win_rate_judge_high"]
    header, first, second = report.part_rows(compare([SFT, refusing]) | {"parts": parts})
    assert header[:4] == ["prompts of", "responses", "refusals, SFT", "refusals, PPO"]
    assert header[-2:] == ["wins by reward", "wins by judge"]
    assert first[:3] == ["help", "3", "0.000"] and second[0] == "harm" and second[3] == "1.000"


@pytest.mark.parametrize("parts", [[], [None] * 4, ["one"] * 4, ["one", None, "one", None]])
def test_prompts_of_one_part_have_no_table(parts):
    assert compare_parts([SFT, PPO], parts) == []
    assert report.part_table(compare([SFT, PPO]) | {"parts": []}) == "" == report.part_table(compare([SFT, PPO]))


def test_intervals_are_paired_by_prompt():
    metrics = compare([SFT, PPO])["metrics"]
    # The reward rises by exactly 1 on every prompt: no doubt about the change, though the means are uncertain.
    assert (metrics["ppo_vs_sft/reward_delta_low"], metrics["ppo_vs_sft/reward_delta_high"]) == (1.0, 1.0)
    assert metrics["ppo/reward_mean_low"] < 2.0 < 3.0 < metrics["ppo/reward_mean_high"]
    assert metrics["ppo_vs_sft/win_rate_judge_low"] < 0.625 < metrics["ppo_vs_sft/win_rate_judge_high"]


def test_every_further_policy_is_compared_with_the_first():
    third = dataclasses.replace(SFT, name="dpo", scores={"reward": [0.0] * 4, "judge": [1.0] * 4})
    metrics = compare([SFT, PPO, third])["metrics"]
    assert metrics["dpo_vs_sft/win_rate_judge"] == 1.0
    assert metrics["dpo_vs_sft/win_rate_reward"] == 0.125
    assert not [key for key in metrics if "vs_ppo" in key]


def test_a_repeated_prompt_is_one_unit():
    pair = [dataclasses.replace(policy, prompts=["p1", "p1", "p3", "p3"]) for policy in (SFT, PPO)]
    result = compare(pair)
    assert result["num_prompts"] == 2
    # Two units with judge means 0.7 and 0.4: no resample lies outside them, as single responses would.
    limits = [result["metrics"][f"ppo/judge_mean_{side}"] for side in ("low", "high")]
    assert limits == pytest.approx([0.4, 0.7])
    limits = [result["metrics"][f"ppo_vs_sft/win_rate_judge_{side}"] for side in ("low", "high")]
    assert limits == pytest.approx([0.5, 0.75])


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"name": "sft"}, "policy names are"),
        ({"name": "p p o"}, "use one word"),
        ({"prompts": ["p2", "p1", "p3", "p4"]}, "prompts are not those of 'sft'"),
        ({"kl": [1.0]}, "kl has 1 entries for 4 prompts"),
        ({"kl": [1.0, 2.0, float("nan"), 0.0]}, "kl of response 2 is nan"),
        ({"scores": {"judge": [1.0] * 4}}, r"has scores \['judge'\]"),
        ({"scores": {"judge": [1.0] * 3, "reward": [1.0] * 4}}, r"scores\['judge'\] has 3"),
        ({"scores": {"kl": [1.0] * 4}}, "score is named 'kl'"),
    ],
)
def test_bad_input_is_one_line(change, seen):
    with pytest.raises(UserError, match=seen) as error:
        compare([SFT, dataclasses.replace(PPO, **change)])
    assert "\n" not in str(error.value)


def test_one_policy_is_not_a_comparison():
    with pytest.raises(UserError, match="got 1 policies"):
        compare([SFT])


def test_table():
    lines = report.comparison_table(compare([SFT, PPO])).splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned in a terminal
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["measure", "SFT", "PPO", "change"]
    rows = {row[0]: row[1:] for row in cells[2:]}
    assert rows["reward, mean"][2] == "+1.000"  # no interval where there is no doubt
    assert rows["EOS rate"][0].startswith("0.750 [")
    assert rows["length, tokens"][2].startswith("-1.5 [-")
    assert rows["distinct-2"] == ["0.625", "0.500", "x 0.80"]
    assert rows["win rate over SFT by judge"][1].startswith("0.625 [")
    assert rows["KL to reference, nats per response"][0] == "0.00"


def test_picked_samples_are_best_worst_and_random_each_once():
    after = np.zeros(40)
    after[[7, 3, 20, 30]] = [0.9, 0.8, -0.7, -0.6]
    picked = report.pick_samples([0.0] * 40, after.tolist(), seed=1)
    assert picked[:4] == [(7, "best"), (3, "best"), (20, "worst"), (30, "worst")]
    assert [reason for _, reason in picked[4:]] == ["random"] * 4
    assert len({index for index, _ in picked}) == 8
    assert picked == report.pick_samples([0.0] * 40, after.tolist(), seed=1)
    assert len(report.pick_samples([0.0] * 3, [1.0, 2.0, 3.0])) == 3


def test_model_text_cannot_break_the_table():
    assert report.escape_markdown("a|b\n*c* <br> `d`") == r"a\|b<br>\*c\* \<br\> \`d\`"


def history(steps=5):
    frame = pd.DataFrame({"ppo_step": range(steps), "objective/kl": np.arange(steps) * 1.0})
    frame["objective/scores"] = frame["objective/kl"] / 2
    frame["eval/kl"], frame["eval/scores"] = [np.nan] * (steps - 1) + [3.0], [np.nan] * (steps - 1) + [1.0]
    return frame


def test_report_is_written(tmp_path):
    result = compare([SFT, PPO])
    path = report.write_report(tmp_path / "new", result, [SFT, PPO], history())
    text = path.read_text(encoding="utf-8")
    assert report.comparison_table(result) in text
    assert "(comparison.png)" in text
    assert (tmp_path / "new" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    samples = [line for line in text.splitlines() if line.startswith(("| best", "| worst", "| random"))]
    assert samples[0] == "| best | p1 | a b c | a b | 0.50 -> 0.90 |"
    assert samples[2] == "| worst | p4 | a b f | a c | 0.50 -> 0.10 |"
    assert len(samples) == 4


@pytest.mark.parametrize(
    "frame",
    [None, pd.DataFrame(), pd.DataFrame({"ppo_step": [1], "objective/kl": [1.0]}), history(1)],
    ids=["none", "empty", "without scores", "one step"],
)
def test_picture_without_a_usable_history(tmp_path, frame):
    path = report.plot_comparison(compare([SFT, PPO]), [SFT, PPO], frame, tmp_path / "a.png")
    assert path.stat().st_size > 10_000


def test_picture_shows_the_numbers(tmp_path):
    """What the panels draw, read back from the figure's objects rather than from its pixels."""
    from matplotlib.figure import Figure

    from rlhf.evaluation import _panels

    result, figure = compare([SFT, PPO]), Figure()
    left, middle = figure.subplots(1, 2)
    _panels.score_histograms(left, [SFT, PPO], "judge")
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["SFT, mean 0.50", "PPO, mean 0.55"]
    assert left.get_xlim() == (0.0, 1.0)
    _panels.reward_against_kl(middle, history())
    assert middle.collections[0].get_offsets().tolist() == [[0, 0], [1, 0.5], [2, 1], [3, 1.5], [4, 2]]
    assert [line.get_xydata().tolist() for line in middle.lines][1] == [[3.0, 1.0]]
    other = Figure()
    _panels.summary_bars(other, other.add_gridspec(1, 1)[0], result, "judge")
    shown = [[text.get_text() for text in axes.texts] for axes in other.axes]
    assert shown[0][0].startswith("62% [")
    assert shown[1:] == [["3.5", "2.0"], ["75%", "100%"], ["0.62", "0.50"]]


def test_unknown_judge_is_refused():
    assert report.main_judge(["reward", "judge", "vader"]) == "judge"
    assert report.main_judge(["reward", "vader"]) == "vader"
    with pytest.raises(UserError, match=r"judge 'human' is not among the scores \['reward'\]"):
        report.main_judge(["reward"], "human")
    with pytest.raises(UserError, match="judge None"):
        report.main_judge([])
