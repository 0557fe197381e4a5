"""report.html of a run that was written by hand: its numbers are the artifacts', and its texts stay texts."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from pipelines.report import run_folder, write
from rlhf.errors import UserError
from rlhf.evaluation.curves import load_run
from rlhf.evaluation.runs import evaluation_frame, headlines, recipe_differences
from rlhf.report import charts, lineage, recipes, samples
from rlhf.report.page import page, write_page
from tests.run_toys import CHINESE, PLANTED, build_run, sample, write_jsonl, write_stage


class Elements(HTMLParser):
    """Names and attributes of all elements of a page, as a browser finds them, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    return load_run(build_run(tmp_path))


def test_the_page_holds_what_the_artifacts_say(run):
    text = page(run)
    shown = Elements(text).text
    for expected in (
        "Run toy",
        "8.0 nats",
        "50.0 %",
        "alerts in PPO: kl",
        "alerts/kl from step 3",
        "raise ppo.kl_coef",
    ):
        assert expected in shown, expected
    assert CHINESE in shown and "step 0 (SFT)" in shown
    assert "No reward model in this run" in shown and "no finished reward" in shown


def test_planted_markup_stays_text(run):
    text = page(run)
    elements = Elements(text)
    assert not [attributes for _, attributes in elements.found if any(name.startswith("on") for name in attributes)]
    assert [name for name, _ in elements.found].count("script") == 1
    assert PLANTED in elements.text


def test_the_policy_lets_only_the_page_s_own_script_run(run):
    text = page(run)
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_page_needs_no_other_file(run):
    elements = Elements(page(run))
    links = [a[name] for _, a in elements.found for name in ("src", "href", "xlink:href", "action") if a.get(name)]
    assert links and all(link.startswith(("#", "data:")) for link in links)


def test_the_same_artifacts_give_the_same_bytes(tmp_path):
    first, second = (write_page(load_run(build_run(tmp_path / place))) for place in "ab")
    assert first.name == "report.html" and first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("stages", [("sft",), ("ppo",), ("sft", "ppo"), ("evaluate",)])
def test_what_is_missing_is_said_in_a_line(tmp_path, stages):
    run = load_run(build_run(tmp_path, stages=stages))
    (run.path / "ppo.partial").mkdir()
    shown = Elements(page(run)).text
    assert "Running or interrupted, and not on this page: ppo" in shown
    assert ("No samples in this run" in shown) == (stages == ("sft",))
    assert ("No evaluation in this run" in shown) == ("evaluate" not in stages)
    assert ("No metrics.jsonl in this run" in shown) == (stages == ("evaluate",))


def test_samples_of_an_earlier_version_are_shown_without_colours(tmp_path):
    run = build_run(tmp_path)
    new = {"tokens", "token_kl", "token_value", "token_reward"}
    rows = [{k: v for k, v in sample(step, "p", ["old text"], 1.0).items() if k not in new} for step in (0, 4)]
    write_jsonl(run / "ppo" / "samples.jsonl", rows)
    text = samples.samples_html(load_run(run))
    assert "old text" in text and "no numbers per token" in text and "data-token-kl" not in text


def test_the_sides_of_a_sample(run):
    training, evaluation = samples.groups(run)
    assert training.labels == ["step 0 (SFT)", "step 4"] and training.score == "score"
    assert [prompt for prompt, _ in training.pairs] == ["a film", PLANTED, "电影"]
    assert [side.row["response"] for side in training.pairs[0][1]] == [" good.", " great great"]
    assert evaluation.labels == ["SFT", "PPO"] and evaluation.score == "judge" and len(evaluation.pairs) == 30
    assert [side.row["score"] for side in evaluation.pairs[0][1]] == [0.25, 0.75]
    text = samples.samples_html(run)
    assert "data-token-kl='[2.0,2.0,2.0]'" in text and "<i> great</i><i> great</i><i class=end>EOS</i>" in text


def test_a_prompt_that_stands_twice_keeps_its_places():
    rows = [sample(step, "p", [text], 0.0) for step, text in ((0, "a"), (0, "b"), (4, "c"), (4, "d"))]
    group = samples._group("name", "score", rows, "step", {0: "early", 4: "late"})
    assert [[side.row["response"] for side in sides] for _, sides in group.pairs] == [["a", "c"], ["b", "d"]]


def test_long_lists_are_cut_and_it_says_so(run, monkeypatch):
    monkeypatch.setattr(samples, "MOST_CHARACTERS", 3000)
    text = samples.samples_html(run)
    assert "of 30 prompts." in text and 3 < text.count("<article>") < 15


@pytest.mark.parametrize(
    ("steps", "published", "expected"),
    [
        ([0, 20, 40], 20, [0, 20, 40]),
        (list(range(0, 101, 10)), 100, [0, 20, 40, 60, 80, 100]),
        (list(range(0, 101, 10)), 70, [0, 20, 50, 70, 80, 100]),
        (list(range(0, 101, 10)), None, [0, 20, 40, 60, 80, 100]),
    ],
)
def test_chosen_steps(steps, published, expected):
    assert samples.chosen_steps(steps, published) == expected


def test_the_lineage_shows_hashes_dates_times_and_what_is_stale(run):
    picture = lineage.lineage_svg(run)
    for expected in ("sft-hash", "ppo-hash", "d1d2d3d4d5d6", "2026-01-02 03:04 UTC", "2 min 05 s, 1.2 GiB"):
        assert expected in picture, expected
    assert picture.count("class='arrow'") == 2 and picture.count("class='arrow stale'") == 1
    assert picture.count("class='arrow data'") == 3


def test_the_lineage_of_a_policy_from_another_run(tmp_path):
    write_stage(tmp_path / "r", "evaluate", inputs={"../<b>/ppo": "x"}, data={}, finished="")
    picture = lineage.lineage_svg(load_run(tmp_path / "r"))
    assert "from another run" in picture and "date not recorded" in picture and picture.count("class='arrow'") == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.6, "8 s"), (119.4, "119 s"), (125.4, "2 min 05 s"), (7320, "2 h 02 min")]
)
def test_durations(seconds, text):
    assert lineage.duration(seconds) == text


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.3, 7.2, [0, 2, 4, 6, 8]),
        (-1.1, 2.2, [-2, -1, 0, 1, 2, 3]),
        (5.25, 5.5, [5.25, 5.3, 5.35, 5.4, 5.45, 5.5]),
        (1e-7, 3e-7, [1e-7, 1.5e-7, 2e-7, 2.5e-7, 3e-7]),
    ],
)
def test_nice_ticks(low, high, ticks):
    assert charts.nice_ticks(low, high) == pytest.approx(ticks, rel=1e-9)


def chart_of(text: str, title: str) -> str:
    (figure,) = [part for part in text.split("<figure") if f"<b>{title}</b>" in part]
    return figure


def lines_of(figure: str) -> dict[str, list]:
    (data,) = re.findall(r"data-lines='([^']*)'", figure)
    return {label: [x, y] for label, _, x, y in json.loads(html.unescape(data))}


def test_curves_hold_the_logged_numbers_and_mark_alerts(run, tmp_path):
    first, others = charts.stage_charts(run, "ppo", load_run(build_run(tmp_path, "other")))
    scores = lines_of(chart_of(first, "Reward score"))
    assert scores["sampled in training"] == [[1, 2, 3, 4], [0.5, 1.0, 1.5, 2.0]]
    assert scores["held-out prompts"] == [[4], [1.75]] and scores["other"] == scores["sampled in training"]
    kl = chart_of(first, "KL to the reference")
    assert "alert: kl" in kl and "alert" not in chart_of(first, "Reward score")
    (band,) = re.findall(r"data-alert='kl' d='([^']*)'", kl)
    edges = [[float(n) for n in re.findall(r"[MH]([\d.]+)", part)[:2]] for part in band.split("z")[:-1]]
    # The axis runs from step 1 at 52 to step 4 at 392: steps 3 and 4 with half a step to either side.
    assert edges == [[222.0, 335.3], [335.3, 392.0]]
    assert "Policy loss" not in first  # its only number was NaN
    assert others == ""


def test_other_metrics_follow(run):
    rows = [{"ppo_step": 1, "objective/scores/<b>": 1.0}, {"ppo_step": 2, "objective/scores/<b>": 3.0}]
    write_jsonl(run.path / "ppo" / "metrics.jsonl", rows)
    first, others = charts.stage_charts(run, "ppo")
    assert first == "" and lines_of(chart_of(others, "objective/scores/&lt;b&gt;"))["this run"] == [[1, 2], [1, 3]]


def test_long_curves_are_averaged():
    table = pd.DataFrame({"step": range(1, 1201), "loss": [1.0, 3.0] * 600})
    (line,) = charts._line(table, "step", "loss", "training", "c0")
    assert len(line.x) == 300 and line.x[:2] == [2.5, 6.5] and set(line.y) == {2.0}


def test_a_constant_curve_and_a_single_point_are_drawn():
    panel = charts.Panel(charts.Chart("t", "", []), [charts.Line("a", "c0", [3.0], [0.0])])
    assert "nan" not in charts.draw(panel, "step") and "<circle" in charts.draw(panel, "step")
    assert charts.draw(charts.Panel(charts.Chart("t", "", []), []), "step") == ""


def test_settings_that_are_not_the_defaults(run):
    frame = recipes.chosen_settings(run.stages["ppo"].manifest["recipe"])
    rows = {setting: (value, default) for setting, value, default in frame.itertuples(index=False)}
    assert rows["ppo.kl_coef"] == ("0.1", "0.05") and rows["sft.max_length"] == ("64", "1024")
    assert rows["ppo.data"] == ('"movie_reviews"', "required")
    assert rows["sft.trainer.learning_rate"] == ("0.002", "")
    assert "ppo.gamma" not in rows and "ppo.rewards" not in rows and "name" not in rows


def test_two_runs_differ_in_what_was_changed(tmp_path):
    runs = [load_run(build_run(tmp_path, "one")), load_run(build_run(tmp_path, "two", 0.25, ("sft", "ppo")))]
    frame = recipe_differences(runs)
    assert frame.to_dict("records") == [{"setting": "ppo.kl_coef", "one": "0.1", "two": "0.25"}]
    found = headlines(runs).set_index("measure")
    assert list(found.loc["PPO, last step: KL, nats per response"]) == ["8.12", "8.12"]
    assert list(found.loc["evaluate: length, tokens"]) == ["2.0", "-"]
    assert found.loc["evaluate: win rate over sft by judge", "one"].startswith("0.500 [0.")
    table = evaluation_frame(runs)
    assert table.loc["length, tokens", ("one", "PPO")] == "2.0" and "two" not in table.columns.get_level_values(0)
    shown = Elements(page(*runs)).text
    assert "Against two" in shown and "0.25" in shown


def test_the_headline_is_by_the_first_judge_of_the_recipe_everywhere(tmp_path):
    folder = build_run(tmp_path)
    manifest = json.loads((folder / "evaluate" / "manifest.json").read_text(encoding="utf-8"))
    result = manifest["comparison"]
    key = "ppo_vs_sft/win_rate_held_back"
    result["metrics"] |= {key: 0.9, f"{key}_low": 0.85, f"{key}_high": 0.95}
    result |= {"scores": ["held_back", "judge"], "headline": "held_back"}  # `judge` has 0.5
    (folder / "evaluate" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    rows = [json.loads(line) for line in (folder / "evaluate" / "samples.jsonl").read_text("utf-8").splitlines()]
    rows = [row | {"scores": row["scores"] | {"held_back": 7.25}} for row in rows]
    write_jsonl(folder / "evaluate" / "samples.jsonl", rows)
    run = load_run(folder)
    assert "PPO beats SFT by held_back (85.0 % to 95.0 %)" in Elements(page(run)).text
    evaluation = samples.groups(run)[1]
    assert evaluation.score == "held_back" and evaluation.pairs[0][1][0].row["score"] == 7.25
    found = headlines([run]).set_index("measure")["toy"]
    assert found["evaluate: win rate over sft by held_back"] == "0.900 [0.850, 0.950]"
    assert "evaluate: win rate over sft by judge" not in found


def test_parts_of_a_mixture_have_a_table(tmp_path):
    folder = build_run(tmp_path)
    path = folder / "evaluate" / "manifest.json"
    assert "prompts of" not in Elements(page(load_run(folder))).text
    manifest = json.loads(path.read_text(encoding="utf-8"))
    rates = {"sft/refusal_rate": 0.125, "ppo/refusal_rate": 0.875}
    manifest["comparison"]["parts"] = [{"part": "<b>harmful", "num_responses": 8, "metrics": rates}]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    shown = Elements(page(load_run(folder))).text
    assert "refusals, SFT" in shown and "0.125" in shown and "0.875" in shown and "<b>harmful" in shown


def test_runs_of_one_name_cannot_be_told_apart(tmp_path):
    runs = [load_run(build_run(tmp_path / place)) for place in "ab"]
    with pytest.raises(UserError, match="two have one name"):
        page(*runs)


def test_a_damaged_reward_report_is_said_in_a_line(tmp_path):
    run = build_run(tmp_path)
    folder = write_stage(run, "reward", inputs={"sft": "sft-hash"})
    assert "no report.json: `make report STAGE=reward` makes one" in Elements(page(load_run(run))).text
    (folder / "report.json").write_text("{", encoding="utf-8")
    assert "report.json is damaged" in Elements(page(load_run(run))).text
    (folder / "report.json").write_text('{"schema": 0}', encoding="utf-8")
    assert "report.json is of another version" in Elements(page(load_run(run))).text


def test_a_run_that_is_not_there_is_named_with_those_that_are(tmp_path):
    for place in ("careful/sft", "tiny/ppo", "data/pairs"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "manifest.json").write_text("{}")
    assert run_folder(tmp_path, "tiny", "--run") == tmp_path / "tiny"
    with pytest.raises(UserError, match=r"--run tyni: no such run in .*: there are careful, tiny$"):
        run_folder(tmp_path, "tyni", "--run")
    with pytest.raises(UserError, match=r"--against tyni: .*: there are careful, tiny$"):
        write(tmp_path, "tiny", "tyni")
