"""Folds of a preference set: each pair is measured by models that did not see its prompt, whatever they start from."""

import json
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import reward_cv, reward_settings
from tests.builders import build_model, build_sft_artifact, build_tokenizer, write_data_recipe, write_rows
from tests.reward_toys import honest_pairs

GPU = "CUDA_VISIBLE_DEVICES"
SIZES = ["max_length=96", "trainer.per_device_train_batch_size=8", "trainer.learning_rate=1e-2"]


def measured(monkeypatch: pytest.MonkeyPatch, root: Path, *more: str) -> dict:
    base = root / "toy" / "sft" / "model"
    if not base.exists():
        tokenizer = build_tokenizer()
        build_sft_artifact(root, tokenizer=tokenizer, model=build_model(tokenizer, 112, n_embd=32, n_head=4))
    split = {"by": "row", "rows": {"train": 140, "validation": 10, "test": 10}}
    recipe = write_data_recipe(root, "preference", split=split)
    write_rows(root / "preference.jsonl", honest_pairs(160, seed=0))
    command = ["cv", *SIZES, *more, "--base", str(base), "--data", str(recipe), "--folds", "2", "--device", "cpu"]
    command += ["--artifacts", str(root / "artifacts"), "--out", str(root / "cv.json")]
    monkeypatch.setattr(sys, "argv", command)
    reward_cv.main()
    return json.loads((root / "cv.json").read_text(encoding="utf-8"))


def test_every_pair_is_in_one_fold_and_the_words_that_decide_are_found(tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(
        reward_cv, "train", lambda *args, plain=reward_cv.train: trained.append(args[2]) or plain(*args)
    )
    state = measured(monkeypatch, tmp_path, "trainer.num_train_epochs=4", "--members", "2")
    folds = [fold["sets"]["preference"] for fold in state["folds"]]
    assert sum(len(fold["model"]) for fold in folds) == 160  # train, validation and test, each pair once
    for fold, rows in zip(folds, trained, strict=True):
        assert not {row["prompt"] for row in rows} & set(fold["prompts"])
    found = reward_cv.summary([state | {"folds": [fold]} for fold in state["folds"][::-1]])  # a file for each
    assert found == reward_cv.summary([state]) and found["folds"] == [0, 1]
    row = found["sets"]["preference"]
    assert row["pairs"] == 160 and row["tfidf"]["lead"] == [0, 0, 0]
    assert row["model"]["lead"][0] == pytest.approx(row["model"]["all"] - row["tfidf"]["all"])
    with pytest.raises(SystemExit, match="or a fold twice"):
        reward_cv.summary([state, state])
    both = reward_cv.joined(state["folds"], "preference")
    assert len(both["model"]) == 160 and both["model"].mean() > 0.8 and both["both"].mean() > 0.8
    assert "| preference | 160 |" in capsys.readouterr().out
    measured(monkeypatch, tmp_path, "trainer.num_train_epochs=4", "--members", "2")
    assert len(trained) == 2  # nothing is done twice
    with pytest.raises(SystemExit, match="was measured with"):
        measured(monkeypatch, tmp_path, "--members", "1")


def test_tfidf_is_fitted_once_for_all_reward_models_on_the_same_folds(tmp_path, monkeypatch):
    fitted = []
    plain = reward_cv.tfidf_baseline
    monkeypatch.setattr(reward_cv, "tfidf_baseline", lambda *args: fitted.append(args) or plain(*args))
    first = measured(monkeypatch, tmp_path, "trainer.num_train_epochs=1")
    (tmp_path / "cv.json").unlink()
    second = measured(monkeypatch, tmp_path, "trainer.num_train_epochs=1", "loss=smoothed")
    verdicts = [[fold["sets"]["preference"]["tfidf"] for fold in state["folds"]] for state in (first, second)]
    assert verdicts[0] == verdicts[1] and len(fitted) == 2  # one for each fold
    reward_cv.tfidf_margins(tmp_path / "kept.json", [*honest_pairs(20, seed=1)], honest_pairs(5, seed=2))
    reward_cv.tfidf_margins(tmp_path / "kept.json", [*honest_pairs(20, seed=3)], honest_pairs(5, seed=2))
    assert len(fitted) == 4  # other pairs


def test_the_base_may_first_be_tuned_on_the_same_folds(tmp_path, monkeypatch):
    bases = []
    plain = reward_cv.new_reward_model
    monkeypatch.setattr(reward_cv, "new_reward_model", lambda base, seed: bases.append(Path(base)) or plain(base, seed))
    state = measured(monkeypatch, tmp_path, "trainer.num_train_epochs=1", "lm_coef=0.1", "--sft-epochs", "1")
    assert [fold["train_pairs"] for fold in state["folds"]] and len(bases) == 2
    assert {base.name for base in bases} == {"sft"} and (bases[0] / "model.safetensors").is_file()


def test_settings_are_compared_pair_by_pair_on_the_same_folds(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- measured reward_cv_settings: begin -->\n<!-- measured reward_cv_settings: end -->\nb\n")
    monkeypatch.setattr(reward_cv, "PAGE", page)
    monkeypatch.setattr(reward_cv, "SETTINGS", tmp_path / "settings.json")

    def state(margins: list[float], prompts: str) -> dict:
        given = {"tfidf": [1.0, -1.0, -1.0, -1.0], "shorter": [True, True, False, False], "prompts": list(prompts)}
        fold = {"fold": 0, "seconds": 60.04, "sets": {"one": given | {"model": margins}}}
        return {"about": {"seed": 0}, "commit": "abc", "folds": [fold]}

    files = {
        "first": ([1.0, 1.0, -1.0, 0.0], "pqrs"),
        "k=2": ([1.0, -2.0, 3.0, 4.0], "pqrs"),
        "odd": ([1.0] * 4, "pqrx"),
    }
    paths = [tmp_path / f"{name.replace('=', '')}.json" for name in files]
    for path, (margins, prompts) in zip(paths, files.values(), strict=True):
        path.write_text(json.dumps(state(margins, prompts)))
    named = [f"{name}={path}" for name, path in zip(files, paths, strict=True)]  # the last = parts them
    monkeypatch.setattr(sys, "argv", ["cv", "--compare", *named[:2]])
    reward_cv.main()
    lines = page.read_text().splitlines()
    assert lines[4] == "| TF-IDF | - | 0.250 | 0.500 |"
    assert lines[5] == "| first | 60 | 0.625 | 1.000 |"  # a tie is one half
    assert lines[6].startswith("| k=2 | 60 | 0.750 (+0.125 [-") and lines[6].endswith(" | 0.500 |")
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert [row["setting"] for row in kept] == ["first", "k=2"] and kept[1]["sets"]["one"]["pairs"] == 4
    with pytest.raises(SystemExit, match=r"odd\.json has other sets or pairs than .*first\.json"):
        reward_cv.compared(list(zip(files, paths, strict=True)))
    folds = json.loads(paths[0].read_text())["folds"] + [json.loads(paths[1].read_text())["folds"][0] | {"fold": 1}]
    paths[2].write_text(json.dumps(state([], "") | {"folds": folds[::-1]}))
    paths[0].write_text(json.dumps(state([], "") | {"folds": folds}))  # the order does not matter
    rows = reward_cv.compared([("a", paths[0]), ("b", paths[2])])
    assert rows[1]["sets"]["one"]["lead"] == [0, 0, 0] and rows[1]["sets"]["one"]["pairs"] == 8
    for words in (["--compare", "no.json"], ["--compare", "a=b", "--publish", "c"]):
        monkeypatch.setattr(sys, "argv", ["cv", *words])
        with pytest.raises(SystemExit, match="2"):
            reward_cv.parse()


def test_settings_run_one_at_a_time_on_each_gpu_and_what_is_finished_is_kept(tmp_path, monkeypatch, capsys):
    calls, published, busy = [], [], Counter()
    robust_fails = True

    def run(command, *, env, **_):
        out, label, gpu = Path(command[command.index("--out") + 1]), command[command.index("--run") + 1], env[GPU]
        calls.append((label, command))
        busy[gpu] += 1
        assert busy[gpu] == 1  # one at a time on each
        if len(calls) < 3:
            together.wait(timeout=20)  # the first two, on two GPUs
        busy[gpu] -= 1
        used.add(gpu)
        if label == "robust" and robust_fails:
            return SimpleNamespace(returncode=1)
        given = {
            "tfidf": [1.0, -1.0],
            "shorter": [True, False],
            "prompts": ["p", "q"],
            "model": [1.0, len(calls) - 2.0],
        }
        state = {"about": {}, "folds": [{"fold": 2, "seconds": 60.0, "sets": {"one": given}}]}
        out.write_text(json.dumps(state), encoding="utf-8")
        return SimpleNamespace(returncode=0)

    def main(*more: str, base: str = "b") -> str:
        command = ["settings", "--base", base, "--workdir", str(tmp_path), "--fold", "2", "--gpus", "1", "3", *more]
        monkeypatch.setattr(sys, "argv", command)
        reward_settings.main()
        return capsys.readouterr().out

    together, used = threading.Barrier(2), set()
    monkeypatch.setattr(reward_settings, "load_sets", lambda *_: {})
    monkeypatch.setattr(reward_settings.subprocess, "run", run)
    monkeypatch.setattr(reward_settings, "publish_settings", published.append)
    three = ["--only", "as in the five folds", "plain text", "robust", "--publish"]
    with pytest.raises(SystemExit, match=r"not finished: as in the five folds, plain text, robust$"):
        main(*three[:-1], "--minutes", "3", "max_length=9")  # less than one is taken to need
    with pytest.raises(SystemExit, match="2"):
        main(*three, "max_length=9")
    assert not calls and "publish with reward_cv --compare" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"not finished: robust \(failed: robust\)"):
        main(*three)
    assert sorted(label for label, _ in calls) == ["as_in_the_five_folds", "plain_text", "robust"] and used == {
        "1",
        "3",
    }
    first, plain, robust = (dict(calls)[label] for label in ("as_in_the_five_folds", "plain_text", "robust"))
    assert set(first) - set(plain) == {"--chat", "as_in_the_five_folds", str(tmp_path / "as_in_the_five_folds.json")}
    assert set(robust) - set(first) == {"loss=robust", "robust", str(tmp_path / "robust.json")}
    assert "| robust |" not in capsys.readouterr().out and not published
    robust_fails = False
    lines = main(*three).splitlines()
    assert len(calls) == 4  # robust alone once more
    assert [line.split(" | ")[0] for line in lines[3:]] == ["| as in the five folds", "| plain text", "| robust"]
    assert [item.split("=")[0] for item in published[0]] == ["as in the five folds", "plain text", "robust"]
    with pytest.raises(SystemExit, match=r"plain_text\.command holds another command"):
        main("--only", "plain text", base="another")
    with pytest.raises(SystemExit, match=r"not finished: mean of three seeds$"):
        main("--only", "mean of three seeds", "--minutes", "9")  # three models
    assert len(calls) == 4


def test_each_setting_is_one_that_the_reward_section_or_reward_cv_knows(monkeypatch):
    args = SimpleNamespace(base="b", data=["d"], limit=None, fold=0, device="cpu")
    args.workdir, args.artifacts = Path("w"), Path("a")
    args.overrides = ["max_length=77", "trainer.learning_rate=7e-5"]
    assert len({reward_settings.out_of(args, label) for label in reward_settings.SETTINGS}) == len(
        reward_settings.SETTINGS
    )
    for label in reward_settings.SETTINGS:
        monkeypatch.setattr(sys, "argv", reward_settings.command(args, label)[2:])
        parsed = reward_cv.parse()
        reward = reward_cv.recipe_of(parsed).reward
        assert reward.trainer["lr_scheduler_type"] == "cosine" and reward.max_length == 77
        assert reward.trainer["learning_rate"] == (5e-5 if label == "half the rate" else 7e-5)
        assert parsed.only == [0] and parsed.chat == (label != "plain text")
