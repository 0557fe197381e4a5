"""From pairs to training rows, with the labelling page in headless Chromium and the keyboard alone."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from pipelines.label_select import main as label_select
from rlhf.data import load_data_recipe, load_rows
from tests.browser import Page, find_browser
from tests.builders import write_rows

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
ROOT = Path(__file__).parents[2]
TEXTS = ["<img src=x onerror=\"document.title='gone'\">", "很好的回答。", "two\nlines", "plain"]


@contextmanager
def served(selected: Path):
    """The page's address, from `python -m pipelines.label`; killed with SIGKILL at the end."""
    command = [sys.executable, "-m", "pipelines.label", "--pairs", str(selected), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield next(line.split()[1] for line in process.stdout if line.startswith("open http"))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def begin(page, url, name):
    page.open(url)
    page.wait("document.activeElement?.id === 'name'")
    page.type("#name", name)
    page.press("Enter")
    page.wait("!document.getElementById('work').hidden")


def press(page, keys, done, total=4):
    """Presses keys one after the other, and waits until the page says that the decision is on disk."""
    for key, number in zip(keys, done, strict=True):
        page.press(key)
        page.wait(f"document.getElementById('progress').textContent === '{number} of {total} done'")
        page.wait("!busy")


def decisions(path):
    return [(row["annotator"], row["label"]) for row in map(json.loads, path.read_text("utf-8").splitlines())]


def test_select_label_train(tmp_path, monkeypatch):
    rows = [{"prompt": f"q {i}", "response_a": text, "response_b": f"other {i}"} for i, text in enumerate(TEXTS)]
    recipe = {"name": "mine", "source": {"files": str(write_rows(tmp_path / "p.jsonl", rows))}, "clean": []}
    recipe["split"] = {"by": "prompt", "fractions": {"train": 1.0}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    os.environ.setdefault("HOME", str(tmp_path))
    assert label_select(["--data", "mine.yaml", "--count", "4", "--method", "diversity"]) == 0
    folder = tmp_path / "artifacts" / "labels" / "mine"
    pairs = [json.loads(line) for line in (folder / "selected.jsonl").read_text("utf-8").splitlines()]
    assert len(pairs) == 4
    labels = folder / "labels.jsonl"

    with Page(BROWSER, tmp_path / "profile") as page:
        with served(folder / "selected.jsonl") as url:
            begin(page, url, "ann")
            shown = [
                page.run(f"document.getElementById('{side}').textContent") for side in ("response_a", "response_b")
            ]
            assert shown == [pairs[0]["response_a"], pairs[0]["response_b"]]
            press(page, "ab", [1, 2])
            press(page, "u", [1])
            press(page, "B", [2])
        with served(folder / "selected.jsonl") as url:  # killed, and started again: goes on where it was
            begin(page, url, "ann")
            assert page.run("document.getElementById('progress').textContent") == "2 of 4 done"
            assert page.run("document.getElementById('response_a').textContent") == pairs[2]["response_a"]
            press(page, "ts", [3, 4])
            assert page.run("document.getElementById('pair').hidden && !document.getElementById('finished').hidden")
            begin(page, url, "bo")
            press(page, "abbs", [1, 2, 3, 4])
            agreed = page.run("document.getElementById('agreement').textContent")
            assert page.run("document.title") == "Which response is better?"  # the markup in a response stayed text
            assert page.run("document.querySelectorAll('img').length") == 0
    assert decisions(labels) == [
        *(("ann", "a"), ("ann", "b"), ("ann", "undo"), ("ann", "b"), ("ann", "tie"), ("ann", "skip")),
        *(("bo", "a"), ("bo", "b"), ("bo", "b"), ("bo", "skip")),
    ]
    # By hand: 2 of 3 agree; ann: a, b, tie; bo: a, b, b; expected (1 + 2) / 9; kappa (2/3 - 1/3) / (2/3).
    assert "3 pairs with several annotators: 67 % agreement, Cohen's kappa 0.50" in agreed

    source = {"labels": str(labels)}
    (tmp_path / "labelled.yaml").write_text(
        yaml.safe_dump(recipe | {"name": "labelled", "source": source, "keep": {"confidence": "agreement"}})
    )
    found = load_rows(load_data_recipe("labelled.yaml"), "train", "preference")
    expected = [(pairs[0]["response_a"], 1.0), (pairs[1]["response_b"], 1.0)]  # the third is a draw, the fourth skipped
    assert sorted((row["chosen"], row["confidence"]) for row in found) == sorted(expected)
