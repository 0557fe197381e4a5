"""report.html of a real run in headless Chromium: it works, asks for nothing, and what a model wrote does not run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.browser import Page, find_browser
from tests.integration.conftest import run_stage
from tests.integration.test_pipeline import rows
from tests.run_toys import CHINESE, PLANTED, sample, write_jsonl

BROWSER = find_browser()
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def report(ci_run, tmp_path_factory) -> Path:
    """The page of the ci run with two more samples and an alert, against itself under another name."""
    root = tmp_path_factory.mktemp("report")
    ignored = shutil.ignore_patterns("model", "critic", "tensorboard", "policies")
    for name in ("ci", "other"):
        shutil.copytree(ci_run, root / name, ignore=ignored)
    ppo = root / "ci" / "ppo"
    last = max(row["step"] for row in rows(ppo / "samples.jsonl"))
    planted = [sample(step, PLANTED, [PLANTED, CHINESE], 9.5) for step in (0, last)]
    write_jsonl(ppo / "samples.jsonl", rows(ppo / "samples.jsonl") + planted)
    history = rows(ppo / "metrics.jsonl")
    write_jsonl(ppo / "metrics.jsonl", [row | {"alerts/kl": int(row["ppo_step"] > 9)} for row in history])
    manifest = json.loads((ppo / "manifest.json").read_text(encoding="utf-8"))
    (ppo / "manifest.json").write_text(json.dumps(manifest | {"alerts": {"kl": 10}}), encoding="utf-8")
    done = run_stage("report", root, "--against", "other")
    assert "report.html (" in done.stdout and done.stderr == ""
    assert not list((root / "ci").glob("*.lock"))
    return root / "ci" / "report.html"


def test_the_page_of_a_real_run_has_every_part(report):
    text = report.read_text(encoding="utf-8")
    assert report.stat().st_size < 5_000_000
    for part in ("lineage", "against", "evaluation", "samples", "curves", "reward", "recipe"):
        assert f"<section id='{part}'>" in text
    assert "The recipes are the same." in text
    assert "class=missing" not in text, "a part that a whole run has is missing"
    score = rows(report.parent / "ppo" / "metrics.jsonl")[0]["objective/scores"]
    assert str(score) in text.replace("&quot;", '"')


def test_a_missing_run_ends_in_one_line(tmp_path):
    done = run_stage("report", tmp_path, "--run", "nowhere", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: report: --run nowhere: no such run")


COLOURS = "new Set([...document.querySelectorAll('#samples .response i')].map(i => i.style.backgroundColor)).size"
SHOWN = "[...document.querySelectorAll('#samples article')].filter(a => a.offsetParent !== null).length"
FIRST = "[...document.querySelectorAll('#samples article')].find(a => a.offsetParent !== null)"


@needs_browser
def test_search_filters_colours_and_curves_work_and_nothing_else_runs(report, tmp_path):
    with Page(BROWSER, tmp_path / "profile") as page:
        page.open(report)
        assert page.run("document.title") == "Run ci"
        assert page.run("document.querySelector('#count').textContent") == "9 of 9 prompts"
        assert page.run(SHOWN) == 9

        page.type("#search", "再看一遍")
        assert page.run("document.querySelector('#count').textContent") == "1 of 9 prompts" and page.run(SHOWN) == 1
        assert PLANTED in page.run(f"{FIRST}.textContent")
        page.screenshot(tmp_path / "planted.png")
        page.type("#search", "")
        page.type("#least", "9")
        assert page.run(SHOWN) == 1
        page.type("#least", "")
        page.type("#most", "9")
        assert page.run(SHOWN) == 8
        page.type("#most", "")

        page.choose("#order", "low")
        scores = "[...document.querySelectorAll('#samples .group:not([hidden]) article')].map(a => +a.lastElementChild"
        found = page.run(f"{scores}.lastElementChild.dataset.score)")
        assert found == sorted(found) and len(set(found)) > 5

        seen = {}
        for heat in ("token_reward", "token_kl", "token_value"):
            page.click(f"button[data-heat={heat}]")
            page.wait(f"document.querySelector('button[data-heat={heat}]').getAttribute('aria-pressed') === 'true'")
            seen[heat] = page.run(f"{FIRST}.outerHTML")
            assert page.run(COLOURS) > 10
        assert len(set(seen.values())) == 3
        page.screenshot(tmp_path / "samples.png")
        page.click("button[data-heat='']")
        assert page.run(COLOURS) == 1

        page.choose("#group", "1")  # the evaluation's policies
        assert (
            page.run("document.querySelector('#count').textContent") == "100 of 100 prompts" and page.run(SHOWN) == 20
        )
        page.click("button.more")
        assert page.run(SHOWN) == 40
        assert page.run("document.querySelector('button[data-heat=token_kl]').disabled")

        page.click("svg[aria-label='KL to the reference']", kind="move")
        assert "sampled in training: " in page.run("document.querySelector('.tip-box').innerText")
        assert page.run("document.querySelectorAll('.fired[data-alert=kl]').length") == 1

        assert (
            page.run("document.title") == "Run ci" and page.run("document.querySelectorAll('img[src=x]').length") == 0
        )
        assert page.errors() == []
        assert [url for url in page.requests() if not url.startswith("data:")] == [report.as_uri()]
        assert len(page.screenshot(tmp_path / "page.png", whole=True)) > 100_000


@needs_browser
def test_the_policy_of_the_page_stops_what_escaping_would_miss(report, tmp_path):
    """The same page with a script, a handler and a request put into it: none of them happens."""
    planted = (
        "<script>document.title='broken in'</script><img src='http://127.0.0.1:9/x' onerror=\"document.title='x'\">"
    )
    (tmp_path / "bad.html").write_text(
        report.read_text(encoding="utf-8").replace("</main>", f"{planted}</main>"), "utf-8"
    )
    with Page(BROWSER, tmp_path / "profile") as page:
        page.open(tmp_path / "bad.html")
        assert page.run("document.title") == "Run ci"
        assert page.run("document.querySelector('#count').textContent") == "9 of 9 prompts"  # our own does run
        assert "Content Security Policy" in str(page.errors())


@needs_browser
def test_without_scripts_everything_can_be_read(report, tmp_path):
    with Page(BROWSER, tmp_path / "profile", dark=True) as page:
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.open(report)
        assert page.run(SHOWN) == 109 and not page.run("document.querySelector('.controls').checkVisibility()")
        dark = page.run("getComputedStyle(document.body).backgroundColor")
        assert dark == "rgb(19, 21, 24)"
