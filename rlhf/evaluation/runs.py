"""Several runs side by side, as tables: what `notebooks/compare_runs.ipynb` and report.html show. Loads no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from rlhf.errors import UserError
from rlhf.evaluation.curves import Run
from rlhf.evaluation.frontier_report import outcome
from rlhf.evaluation.report import comparison_rows, headline_judge, with_interval

ABSENT = "-"


def check_names(runs: Sequence[Run]) -> None:
    """Refuse what cannot be told apart in a table.

    Raises:
        UserError: no runs, or two of one name.
    """
    names = [run.name for run in runs]
    if not names:
        raise UserError("no runs to compare: give at least one")
    if len(set(names)) < len(names):
        raise UserError(f"runs {', '.join(names)}: two have one name and cannot be told apart: give another run")


def recipe_of(run: Run) -> dict[str, Any]:
    """The resolved recipe of a run: of each stage the section that it ran with, the rest from the last stage."""
    manifests = {name: artifact.manifest for name, artifact in run.stages.items()}
    recipe = dict(list(manifests.values())[-1]["recipe"])
    for name, manifest in manifests.items():
        recipe[name] = manifest["recipe"].get(manifest["stage"])
    return recipe


def flattened(value: Any, path: str = "") -> dict[str, str]:
    """Nested settings as dotted path -> value in JSON; lists are values."""
    if not isinstance(value, dict) or not value:
        return {path: json.dumps(value, ensure_ascii=False)}
    flat: dict[str, str] = {}
    for key, below in value.items():
        flat |= flattened(below, f"{path}.{key}" if path else str(key))
    return flat


def recipe_differences(runs: Sequence[Run]) -> pd.DataFrame:
    """The settings in which the runs differ, a row each; a column per run, and `-` where a run has no such setting."""
    check_names(runs)
    columns = {run.name: flattened(recipe_of(run)) for run in runs}
    keys = dict.fromkeys(key for flat in columns.values() for key in flat)
    rows = {key: [flat.get(key, ABSENT) for flat in columns.values()] for key in keys}
    different = {key: row for key, row in rows.items() if len(set(row)) > 1 and key not in ("name", "description")}
    frame = pd.DataFrame.from_dict(different, orient="index", columns=list(columns))
    return frame.rename_axis("setting").reset_index()


def headlines(runs: Sequence[Run]) -> pd.DataFrame:
    """What one asks first of each run, with 95 % intervals where they were measured; rows that no run has are left out.

    They are the numbers of the manifests: of the reward models, of PPO's last step, of the evaluation, and the time.
    """
    check_names(runs)
    columns = {run.name: _headlines(run) for run in runs}
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    frame = pd.DataFrame({name: {key: column.get(key, ABSENT) for key in keys} for name, column in columns.items()})
    return frame.rename_axis("measure").reset_index()


def _headlines(run: Run) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, artifact in run.stages.items():
        manifest, metrics = artifact.manifest, artifact.manifest.get("metrics", {})
        if manifest["stage"] == "reward":
            found[f"{name}: held-out accuracy"] = with_interval(metrics, "accuracy", 3)
            found[f"{name}: TF-IDF baseline"] = with_interval(metrics, "accuracy_tfidf", 3)
            found[f"{name}: gate"] = manifest.get("gate", {}).get("verdict", ABSENT)
        if name == "ppo":
            found["PPO, last step: score"] = with_interval(metrics, "objective/scores", 3)
            found["PPO, last step: KL, nats per response"] = with_interval(metrics, "objective/kl", 2)
            found["PPO: published step"] = with_interval(metrics, "published_ppo_step", 0)
            found["PPO: alerts"] = ", ".join(manifest.get("alerts", {})) or "none"
    found |= _evaluated(run)
    found["minutes, all stages"] = f"{sum(a.manifest['wall_seconds'] for a in run.stages.values()) / 60:.1f}"
    return {key: value for key, value in found.items() if value != ABSENT}


def _evaluated(run: Run) -> dict[str, str]:
    """The evaluation's headline: the last policy against the first."""
    result = comparison_of(run)
    if result is None:
        return {}
    metrics, first, last = result["metrics"], result["policies"][0], result["policies"][-1]
    judge, pair = headline_judge(result), f"{last}_vs_{first}"
    found = {f"evaluate: win rate over {first} by {judge}": with_interval(metrics, f"{pair}/win_rate_{judge}", 3)}
    found |= {
        f"evaluate: {score}, mean": with_interval(metrics, f"{last}/{score}_mean", 3) for score in result["scores"]
    }
    gate = outcome(result.get("frontier"))
    found["evaluate: gate of PPO's policy"] = ABSENT if gate is None else ": ".join(filter(None, gate))
    found["evaluate: KL, nats per response"] = with_interval(metrics, f"{last}/kl_mean", 2)
    found["evaluate: length, tokens"] = with_interval(metrics, f"{last}/length_mean", 1)
    found["evaluate: distinct-2"] = with_interval(metrics, f"{last}/distinct_2", 3)
    return found


def comparison_of(run: Run) -> dict[str, Any] | None:
    """What the evaluate stage measured, or None where the run lacks it."""
    return run.stages["evaluate"].manifest.get("comparison") if "evaluate" in run.stages else None


def evaluation_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """The evaluations' tables side by side: a row per measure, columns (run, policy). Runs without one are left out."""
    check_names(runs)
    tables = {}
    for run in runs:
        result = comparison_of(run)
        if result is not None:
            header, *rows = comparison_rows(result)
            tables[run.name] = pd.DataFrame(rows, columns=header).set_index("measure")
    return pd.concat(tables, axis=1).fillna(ABSENT) if tables else pd.DataFrame()
