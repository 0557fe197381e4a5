"""The notebooks run on a real run directory, on poorer ones, and say one line where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from rlhf.evaluation import curves
from tests.run_toys import build_run

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "reward_curves.ipynb"
REWARD_NOTEBOOK = ROOT / "notebooks" / "reward_model.ipynb"
COMPARE_NOTEBOOK = ROOT / "notebooks" / "compare_runs.ipynb"
REWARD_FIGURES = ("accuracy", "calibration", "scores", "edits", "learning")
FIGURES = ("bargain", "optimiser", "before")  # cells that draw one each; `headline` shows the evaluation's picture


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """Executes a notebook on a run directory, in a kernel of this interpreter, and returns it by cell id."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(
        directory: str | Path, cwd: Path = NOTEBOOK.parent, path: Path = NOTEBOOK
    ) -> dict[str, nbformat.NotebookNode]:
        monkeypatch.setenv("RLHF_RUN_DIR", str(directory))
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = []
        # Without kernel folders, `python3` is ipykernel's own: sys.executable, whatever this machine has installed.
        kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        NotebookClient(notebook, km=kernel, timeout=120, resources={"metadata": {"path": str(cwd)}}).execute()
        return {cell.id: cell for cell in notebook.cells}

    return run


def outputs(cell: nbformat.NotebookNode, mime: str) -> list[str]:
    return [output["data"][mime] for output in cell.outputs if mime in output.get("data", {})]


def html_text(prompt: str) -> str:
    """A sample as pandas escapes it in a table."""
    for plain, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&#34;"), ("'", "&#39;")):
        prompt = prompt.replace(plain, escaped)
    return prompt


def test_notebook_draws_a_finished_run(ci_run, execute):
    cells = execute(ci_run)

    for name in (*FIGURES, "headline"):
        (picture,) = outputs(cells[name], "image/png")
        assert picture.startswith("iVBORw0KGgo"), f"{name} is no PNG"
    assert not [output for cell in cells.values() for output in cell.get("outputs", []) if "ename" in output]
    assert not [
        output for cell in cells.values() for output in cell.get("outputs", []) if output.get("name") == "stderr"
    ]
    (lineage,) = outputs(cells["lineage"], "text/html")
    manifest = json.loads((ci_run / "ppo" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["payload_hash"][:8] in lineage
    assert f"reward {manifest['inputs']['reward'][:8]}" in lineage
    (table,) = outputs(cells["headline"], "text/markdown")
    assert "| EOS rate" in table

    rows = [json.loads(line) for line in (ci_run / "ppo" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    fixed = [row for row in rows if row["kind"] == "fixed"]
    steps = sorted({row["step"] for row in fixed})
    (table,) = outputs(cells["samples"], "text/html")
    shown = [row for row in fixed if row["step"] in (steps[0], steps[-1])]
    assert len(shown) >= 4
    for row in shown:
        assert html_text(row["prompt"]) in table
        assert html_text(row["response"]) in table
    assert f"step {steps[0]}<" in table and f"step {steps[-1]}<" in table


@pytest.mark.parametrize("plot", [curves.plot_bargain, curves.plot_optimiser, curves.plot_before_ppo])
def test_every_panel_of_a_finished_run_is_drawn_and_labelled(ci_run, plot):
    figure = plot(curves.load_run(ci_run))

    for axes in figure.axes:
        assert axes.get_ylabel(), "an axis without its unit"
        if axes.get_label() != "<colorbar>":
            assert axes.get_title() and axes.get_xlabel()
            assert axes.lines or axes.collections, f"{axes.get_title()} is empty"


def test_notebook_on_a_run_without_evaluations(ci_run, execute, tmp_path):
    """No evaluate stage, no eval/* keys, no reward baselines: a recipe may switch all of them off."""
    run = tmp_path / "artifacts" / "bare"
    shutil.copytree(ci_run, run, ignore=shutil.ignore_patterns("evaluate", "model", "critic", "tensorboard"))
    metrics = run / "ppo" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    bare = [{key: value for key, value in row.items() if not key.startswith("eval/")} for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in bare), encoding="utf-8")
    manifest = json.loads((run / "reward" / "manifest.json").read_text(encoding="utf-8"))
    manifest["metrics"] = {"train_loss": manifest["metrics"]["train_loss"]}
    (run / "reward" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "notebooks").mkdir()

    # A relative path, from the notebook's folder as Jupyter starts it.
    cells = execute("artifacts/bare", cwd=tmp_path / "notebooks")

    assert all(len(outputs(cells[name], "image/png")) == 1 for name in FIGURES)
    assert outputs(cells["headline"], "image/png") == []
    assert "no `evaluate` stage" in outputs(cells["headline"], "text/markdown")[0]


def test_notebook_on_a_run_that_stopped_before_ppo(ci_run, execute, tmp_path):
    run = tmp_path / "early"
    shutil.copytree(ci_run / "sft", run / "sft", ignore=shutil.ignore_patterns("model", "tensorboard"))

    cells = execute(run)

    assert all(len(outputs(cells[name], "image/png")) == 1 for name in FIGURES)
    assert "not measured" in outputs(cells["signs"], "text/html")[0]


def test_a_missing_directory_ends_in_one_line(execute):
    with pytest.raises(CellExecutionError) as caught:
        execute("artifacts/no-such-run")

    assert caught.value.ename == "RunError"
    assert (
        caught.value.traceback.strip()
        .splitlines()[-1]
        .startswith("Error: run directory artifacts/no-such-run: not there: ")
    )
    assert "Traceback" not in caught.value.traceback and "curves.py" not in caught.value.traceback


def test_a_directory_without_a_finished_stage_is_refused(tmp_path):
    (tmp_path / "sft.partial").mkdir()
    (tmp_path / "sft.partial" / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(curves.RunError, match="no finished stage in it"):
        curves.load_run(tmp_path)


def test_the_notebook_on_the_reward_model_shows_its_report(ci_run, execute):
    cells = execute(ci_run, path=REWARD_NOTEBOOK)

    every = [output for cell in cells.values() for output in cell.get("outputs", [])]
    assert not [output for output in every if "ename" in output or output.get("name") == "stderr"]
    for name in REWARD_FIGURES:
        (picture,) = outputs(cells[name], "image/png")
        assert picture.startswith("iVBORw0KGgo"), f"{name} is no PNG"
    report = json.loads((ci_run / "reward" / "report.json").read_text(encoding="utf-8"))
    (gate,) = outputs(cells["gate"], "text/html")
    assert all(html_text(check["reason"]) in gate for check in report["gate"]["checks"])
    (failures,) = outputs(cells["failures"], "text/html")
    assert all(html_text(row["prompt"]) in failures for row in report["failures"])


def test_a_run_without_a_reward_report_ends_in_one_line(ci_run, execute, tmp_path):
    shutil.copytree(ci_run / "sft", tmp_path / "early" / "sft", ignore=shutil.ignore_patterns("model", "tensorboard"))
    with pytest.raises(CellExecutionError, match=r"Error: run early: no stage reward: `make reward` makes one"):
        execute(tmp_path / "early", path=REWARD_NOTEBOOK)


def test_the_notebook_on_two_runs_shows_where_they_differ(ci_run, execute, monkeypatch, tmp_path):
    other = build_run(tmp_path, "other", kl_coef=0.75)
    monkeypatch.setenv("RLHF_RUNS", f"{ci_run},{other}")
    cells = execute(ci_run, path=COMPARE_NOTEBOOK)

    every = [output for cell in cells.values() for output in cell.get("outputs", [])]
    assert not [output for output in every if "ename" in output or output.get("name") == "stderr"]
    (picture,) = outputs(cells["curves"], "image/png")
    assert picture.startswith("iVBORw0KGgo")
    (settings,) = outputs(cells["recipe"], "text/html")
    assert "ppo.kl_coef" in settings and "0.05" in settings and "0.75" in settings and "ppo.gamma" not in settings
    (table,) = outputs(cells["evaluation"], "text/html")
    assert "win rate over SFT by judge" in table and ">other<" in table


def test_curves_of_several_runs_share_their_panels(tmp_path):
    runs = [curves.load_run(build_run(tmp_path, name)) for name in ("one", "two")]
    panels = {axes.get_title(): axes for axes in curves.plot_runs(runs).axes}
    lines = {line.get_label(): list(line.get_ydata()) for line in panels["Reward score"].lines}
    assert lines["one"] == lines["two"] == [0.5, 1.0, 1.5, 2.0]
    assert [text.get_text() for text in panels["Reward score"].get_legend().get_texts()] == ["one", "two"]
    assert len(panels["Reward against KL"].lines) == 2
    assert not panels["EOS rate"].lines  # these runs did not log it


def test_a_run_of_half_the_length_is_no_evaluation():
    def run(name, steps, held_out):
        rows = [{"ppo_step": step, "objective/scores": float(step)} for step in range(1, steps + 1)]
        for step in held_out:
            rows[step - 1]["eval/scores"] = float(step)
        return SimpleNamespace(name=name, metrics=lambda stage: pd.DataFrame(rows))

    figure = curves.plot_runs([run("long", 120, [50, 100, 120]), run("short", 60, [20, 60])])
    (panel,) = [axes for axes in figure.axes if axes.get_title() == "Reward score"]
    drawn = {line.get_label(): line.get_marker() for line in panel.lines if line.get_label() in ("long", "short")}
    assert set(drawn) == {"long", "short"} and "D" not in drawn.values()  # diamonds are held-out prompts
    assert [len(line.get_xdata()) for line in panel.lines if line.get_marker() == "D"] == [3, 2]


@pytest.mark.parametrize(
    ("path", "drawn"),
    [(NOTEBOOK, (*FIGURES, "headline")), (REWARD_NOTEBOOK, REWARD_FIGURES), (COMPARE_NOTEBOOK, ("curves",))],
    ids=lambda v: str(v)[-12:],
)
def test_the_committed_notebook_has_outputs_and_no_machine_paths(path, drawn):
    notebook = nbformat.read(path, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    assert all(outputs(cells[name], "image/png") for name in drawn)
    assert path.stat().st_size < 1_000_000
    text = path.read_text(encoding="utf-8")
    assert not [place for place in ("/tmp/", "/home/", "/root/", "/Users/", str(ROOT)) if place in text]


def history(**columns: list[float]) -> pd.DataFrame:
    healthy = {
        "objective/rlhf_reward": [0.0, 1.0],
        "objective/kl": [0.0, 10.0],
        "rollout/eos_rate": [0.95, 1.0],
        "rollout/response_length": [20.0, 15.0],
        "objective/entropy": [60.0, 30.0],
        "val/explained_variance": [-1.0, 0.8],
    }
    return pd.DataFrame(healthy | {name.replace("__", "/"): values for name, values in columns.items()})


@pytest.mark.parametrize(
    ("column", "values", "sign"),
    [
        ("objective__rlhf_reward", [1.0, 0.5], "score minus KL cost, per response"),
        ("objective__kl", [0.0, -3.0], "KL to the reference, nats per response"),
        ("rollout__eos_rate", [0.9, 0.2], "EOS rate"),
        ("rollout__response_length", [20.0, 6.0], "response length, tokens"),
        ("rollout__response_length", [20.0, 64.0], "response length, tokens"),
        ("objective__entropy", [60.0, 9.0], "entropy, nats per token"),
        ("val__explained_variance", [0.1, -0.2], "explained variance of the critic"),
    ],
)
def test_vital_signs_point_at_the_sick_curve(column, values, sign):
    signs = curves.vital_signs(history(**{column: values}))
    assert signs.loc[sign, "verdict"] == "look"
    assert signs.loc[sign, "last tenth"] == f"{values[1] / (15.0 if 'entropy' in sign else 1.0):.2f}"


def test_vital_signs_of_a_healthy_run():
    assert list(curves.vital_signs(history())["verdict"]) == ["fine"] * 6


def test_steps_with_an_alert_are_marked(tmp_path):
    fired = {"repetition": [0, 0, 1], "kl": [0, 1, 0], "length": [1, 1, 0], "eos_rate": [0, 0, 1], "entropy": [1, 0, 0]}
    panels = {"repetition": "Reward score", "kl": "KL to the reference", "length": "Response length"}
    panels |= {"eos_rate": "EOS rate", "entropy": "Entropy of the policy"}
    row = {"objective/scores": 1.0, "objective/kl": 2.0, "rollout/response_length": 9.0, "rollout/eos_rate": 1.0}
    table = pd.DataFrame([row | {"ppo_step": step, "objective/entropy": 3.0} for step in (1, 2, 3)])

    def spans(table):
        run = SimpleNamespace(metrics=lambda stage: table, settings=lambda stage: {})
        shown = {axes.get_title(): axes for axes in curves.plot_bargain(run).axes}
        return {name: [round(p.get_x() + 0.5) for p in shown[title].patches] for name, title in panels.items()}, shown

    marked, shown = spans(table.assign(**{f"alerts/{name}": values for name, values in fired.items()}))
    assert marked == {"repetition": [3], "kl": [2], "length": [1, 2], "eos_rate": [3], "entropy": [1]}
    assert "alert: kl" in [text.get_text() for text in shown["KL to the reference"].texts]
    assert all(not found for found in spans(table)[0].values())  # an older run has no such columns


def test_early_and_late_pairs_by_prompt_not_by_row():
    def row(step, prompt, response, kind="fixed"):
        numbers = {"score": 0.5, "kl": 1.0, "length": 3, "has_eos": step > 1}
        return {"step": step, "kind": kind, "prompt": prompt, "response": response, **numbers}

    first = [row(1, "a", "a1"), row(1, "b", "b1"), row(1, "c", "c1", "random")]
    last = [row(9, "b", "b9"), row(9, "a", "a9")]
    table = curves.early_and_late(pd.DataFrame([*first, row(5, "a", "a5"), row(5, "b", "b5"), *last]))
    assert list(table["prompt"]) == ["a", "b"]
    assert list(table["step 1", "response"]) == ["a1", "b1"]
    assert list(table["step 9", "response"]) == ["a9", "b9"]
    assert list(table["step 1", "EOS"]) == ["no", "no"] and list(table["step 9", "EOS"]) == ["yes", "yes"]
    assert "step 5" not in table.columns.get_level_values(0)


def test_samples_are_text_not_markup():
    samples = [{"step": 1, "kind": "fixed", "prompt": "<b>p</b> $x$", "response": "<script>", "score": 0.0, "kl": 0.0}]
    html = curves.side_by_side(curves.early_and_late(pd.DataFrame(samples).assign(length=1, has_eos=True))).to_html()
    assert "&lt;script&gt;" in html and "<script>" not in html
    assert 'class="tex2jax_ignore"' in html
