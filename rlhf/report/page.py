"""report.html of a run: one file that needs nothing else, offline, made from the run's artifacts alone.

Responses are text that a model wrote: everything is escaped, and the page's policy lets no script run but its own,
which it knows by its hash, and no request leave the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf.errors import UserError
from rlhf.evaluation import frontier_report
from rlhf.evaluation import report as evaluation
from rlhf.evaluation._panels import display_name
from rlhf.evaluation.curves import Run, vital_signs
from rlhf.evaluation.runs import comparison_of, headlines, recipe_differences, recipe_of
from rlhf.ppo.alerts import CAUSES
from rlhf.report import charts, lineage, recipes, samples
from rlhf.reward import page as reward_page
from rlhf.reward.figures import percent, report_of
from rlhf.reward.gate import REPORT, SCHEMA
from rlhf.reward.page import boxes, escaped, folded, table

PAGE = "report.html"
HERE = Path(__file__).parent
SHOWN = ("Accuracy", "Calibration and margins")  # of the reward report; the rest is a click away
TITLES = {
    "lineage": "Where it comes from",
    "against": "Against another run",
    "evaluation": "Did PPO help?",
    "samples": "Samples",
    "curves": "Curves",
    "reward": "Is the reward model good enough?",
    "recipe": "Recipe",
}


def write_page(run: Run, against: Run | None = None) -> Path:
    """Write `report.html` into the run's directory; the same artifacts give the same bytes.

    Args:
        run: from `rlhf.evaluation.curves.load_run`.
        against: another run, for the differences; its curves lie beneath the run's.

    Raises:
        UserError: both runs have one name.
    """
    path = run.path / PAGE
    path.write_text(page(run, against), encoding="utf-8", errors="replace")
    return path


def page(run: Run, against: Run | None = None) -> str:
    """The whole page as HTML."""
    parts = {
        "lineage": _lineage(run),
        "against": _against(run, against) if against else "",
        "evaluation": _evaluation(run),
        "samples": _samples(run),
        "curves": _curves(run, against),
        "reward": _rewards(run),
        "recipe": _recipe(run),
    }
    parts = {name: body for name, body in parts.items() if body}
    links = "".join(f"<a href='#{name}'>{TITLES[name]}</a>" for name in parts)
    sections = "\n".join(
        f"<section id='{name}'><h2>{TITLES[name]}</h2>{body}</section>" for name, body in parts.items()
    )
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = escaped(f"Run {run.name}")
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{title}</title>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<meta name=viewport content='width=device-width'><style>{style}</style></head>\n"
        f"<body><header class=top><h1>{title}</h1>{_meta(run)}<nav>{links}</nav></header><main>{_glance(run)}\n"
        f"{sections}</main><script>{script}</script></body></html>\n"
    )


def _note(text: str) -> str:
    """The one line that says what is missing."""
    return f"<p class=missing>{escaped(text)}</p>"


def _meta(run: Run) -> str:
    last = list(run.stages.values())[-1].manifest
    hardware = last["hardware"]
    machine = (
        f"{len(hardware['gpus'])} x {hardware['gpus'][0]}" if hardware["gpus"] else f"{hardware['cpus']} CPU cores"
    )
    commit = (last.get("git_commit") or "")[:10]
    facts = [
        f"recipe {last['recipe']['name']}",
        str(last["recipe"].get("description") or ""),
        last.get("finished", "")[:10],
        machine,
        f"commit {commit}" if commit else "",
    ]
    return f"<p class=meta>{escaped(' · '.join(fact for fact in facts if fact))}</p>"


def _glance(run: Run) -> str:
    """The answers in a row of boxes: the gate, the win rate, what it cost, alerts, the time."""
    numbers: list[tuple[str, str]] = []
    for name, artifact in run.stages.items():
        if "gate" in artifact.manifest and artifact.stage == "reward":
            accuracy = artifact.manifest["metrics"].get("accuracy")
            right = "" if accuracy is None else f", {percent(accuracy)} of pairs right"
            numbers.append((str(artifact.manifest["gate"]["verdict"]).upper(), f"gate of {name}{right}"))
    result = comparison_of(run)
    if result is not None:
        first, last, judge = result["policies"][0], result["policies"][-1], evaluation.headline_judge(result)
        metrics, names = result["metrics"], (display_name(result["policies"][-1]), display_name(result["policies"][0]))
        key = f"{last}_vs_{first}/win_rate_{judge}"
        if key in metrics:
            limits = f"{percent(metrics[key + '_low'])} to {percent(metrics[key + '_high'])}"
            numbers.append((percent(metrics[key]), f"{names[0]} beats {names[1]} by {judge} ({limits})"))
        found = frontier_report.outcome(result.get("frontier"))
        if found is not None:
            numbers.append((found[0].upper(), ": ".join(filter(None, ["gate of PPO's policy", found[1]]))))
        if f"{last}/kl_mean" in metrics:
            numbers.append((f"{metrics[f'{last}/kl_mean']:.1f} nats", "KL to the reference, per response"))
    if "ppo" in run.stages and "alerts" in run.stages["ppo"].manifest:
        alerts = run.stages["ppo"].manifest["alerts"]
        numbers.append((str(len(alerts)), f"alerts in PPO{': ' if alerts else ''}{', '.join(alerts)}"))
    seconds = sum(float(artifact.manifest["wall_seconds"]) for artifact in run.stages.values())
    numbers.append((lineage.duration(seconds), f"in {len(run.stages)} stages"))
    return boxes(numbers)


def _lineage(run: Run) -> str:
    unfinished = sorted(path.name.removesuffix(".partial") for path in run.path.glob("*.partial") if path.is_dir())
    note = f"Running or interrupted, and not on this page: {', '.join(unfinished)}." if unfinished else ""
    missing = [name for name in ("sft", "reward", "ppo", "evaluate") if name not in run.stages]
    if missing:
        note += f" This run has no finished {', '.join(missing)}: `make {missing[0]}` makes one."
    return f"<div class=wide>{lineage.lineage_svg(run)}</div>" + (_note(note.strip()) if note else "")


def _against(run: Run, other: Run) -> str:
    differences = recipe_differences([run, other])
    recipe = "<p>The recipes are the same.</p>" if differences.empty else table(differences, ())
    return (
        f"<p>Against <b>{escaped(other.name)}</b>, dashed in the curves below. Brackets are 95 % intervals.</p>"
        f"<h3>Settings that differ</h3>{recipe}"
        f"<h3>Headline numbers</h3>{table(headlines([run, other]), (run.name, other.name))}"
    )


def _evaluation(run: Run) -> str:
    result = comparison_of(run)
    if result is None:
        return _note("No evaluation in this run: `make evaluate` compares its policy with the SFT model.")
    header, *rows = evaluation.comparison_rows(result)
    frame = pd.DataFrame(rows, columns=header)
    parts = [
        f"<p>{result['num_responses']:,} responses to {result['num_prompts']:,} held-out prompts"
        f"{evaluation.sampled(result)}. Brackets are 95 % bootstrap intervals over prompts.</p>",
        table(frame, header[1:]),
    ]
    if found := evaluation.part_rows(result):
        columns, *of_parts = found
        parts.append(table(pd.DataFrame(of_parts, columns=columns), columns[1:]))
    parts.append(_picture(run, evaluation.PICTURE_NAME, "what PPO changed"))
    if "frontier" in result:
        curve = result["frontier"]
        columns, *steps = frontier_report.table_rows(curve)
        parts.append("<h3>Reward against the KL paid for it</h3>")
        parts += [f"<p>{escaped(sentence)}</p>" for sentence in frontier_report.sentences(curve)]
        parts.append(_picture(run, frontier_report.PICTURE_NAME, "reward against KL"))
        parts.append(folded("numbers", table(pd.DataFrame(steps, columns=columns), columns[1:])))
    else:
        parts.append(
            _note(
                "No curve of reward against KL: no policy of PPO and evaluate.best_of_n 1, or the run is older than it."
            )
        )
    return "".join(parts)


def _picture(run: Run, name: str, alt: str) -> str:
    path = run.path / "evaluate" / name
    if not path.is_file():
        return _note(f"No {name} in evaluate.")
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{escaped(alt)}' src='data:image/png;base64,{data}'>"


def _samples(run: Run) -> str:
    intro = (
        "<p>The same prompts early and late. Colours show each token's part: <b>reward</b> is -kl_coef times its KL, "
        "and the score on the last one; <b>KL</b> how much likelier it is than under the SFT model, in nats; "
        "<b>value</b> what the critic expects from there on.</p>"
    )
    body = samples.samples_html(run)
    return intro + body if body else _note("No samples in this run: `make ppo` records them.")


def _curves(run: Run, against: Run | None) -> str:
    parts = []
    for name in run.stages:
        first, others = charts.stage_charts(run, name, against)
        if first or others:
            more = folded("all other metrics", f"<div class=panels>{others}</div>") if others else ""
            signs = _signs(run) if name == "ppo" else ""
            parts.append(f"<h3>{escaped(name)}</h3>{signs}<div class=panels>{first}</div>{more}")
    return "".join(parts) or _note("No metrics.jsonl in this run.")


def _signs(run: Run) -> str:
    """PPO's alerts with their causes, and its vital signs."""
    history = run.metrics("ppo")
    alerts = run.stages["ppo"].manifest.get("alerts", {})
    lines = [
        f"<li><b>alerts/{escaped(name)}</b> from step {int(step)}: {escaped(_cause(name, history))}</li>"
        for name, step in alerts.items()
    ]
    stopped = run.stages["ppo"].manifest.get("stopped")
    parts = [f"<p class=missing>The run ended early: {escaped(stopped)}</p>" if stopped else ""]
    parts.append(f"<ul class=alerts>{''.join(lines)}</ul>" if lines else "<p>No alert fired.</p>")
    if {"objective/entropy", "rollout/response_length"}.issubset(history.columns):
        parts.append(folded("vital signs", table(vital_signs(history).reset_index(), ("first tenth", "last tenth"))))
    return "".join(parts)


def _cause(name: str, history: pd.DataFrame) -> str:
    if name == "length":
        lengths = history["rollout/response_length"]
        name = "longer" if lengths.iloc[-1] > lengths.iloc[0] else "shorter"
    return CAUSES.get(name, "see docs/safety.md")


def _rewards(run: Run) -> str:
    parts = []
    for name, artifact in run.stages.items():
        if artifact.stage != "reward":
            continue
        try:
            report = report_of(run, name)
        except UserError as error:
            parts.append(_note(str(error)))
            continue
        except json.JSONDecodeError as error:
            parts.append(_note(f"{name}/{REPORT} is damaged ({error}): `make report STAGE=reward` makes it again."))
            continue
        if not isinstance(report, dict):
            parts.append(_note(f"{name}/{REPORT} is damaged: `make report STAGE=reward` makes it again."))
        elif report.get("schema") == SCHEMA:
            parts.append(_reward(name, report))
        else:
            parts.append(_note(f"{name}/{REPORT} is of another version: `make report STAGE=reward` measures it again."))
    return "".join(parts) or _note("No reward model in this run: `make reward` makes one.")


def _reward(name: str, report: dict[str, Any]) -> str:
    verdict = escaped(report["gate"]["verdict"])
    reasons = [check for check in report["gate"]["checks"] if check["verdict"] != "pass"]
    listed = "".join(
        f"<li>{escaped(check['verdict'].upper())} {escaped(check['name'])}: {escaped(check['reason'])}</li>"
        for check in reasons
    )
    text = escaped(reward_page.VERDICTS[report["gate"]["verdict"]])
    parts = [
        f"<h3>{escaped(name)}</h3>",
        f"<div class='verdict {verdict}'><b>{verdict}</b>{text}{f'<ul>{listed}</ul>' if listed else ''}</div>",
        reward_page.headline(report),
    ]
    for title, explanation, body in reward_page.sections(report):
        whole = f"<p>{escaped(explanation)}</p>{body}"
        parts.append(f"<h4>{escaped(title)}</h4>{whole}" if title in SHOWN else folded(title, whole))
    return "".join(parts)


def _recipe(run: Run) -> str:
    recipe = recipe_of(run)
    frame = recipes.chosen_settings(recipe)
    whole = folded(
        "the whole resolved recipe", f"<pre>{escaped(json.dumps(recipe, indent=2, ensure_ascii=False))}</pre>"
    )
    return (
        "<p>What the recipe sets otherwise than the defaults, as each stage ran with it.</p>"
        f"<div class=settings>{table(frame, ())}</div>{whole}"
    )
