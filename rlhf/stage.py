"""Running a stage: fingerprint, skip or resume, verified inputs, atomic hand-over.

A `Stage` says what it reads and how it builds; `run_stage` does everything that all stages share.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.artifacts import (
    CHECKPOINTS,
    FINGERPRINT,
    MANIFEST,
    STAGES,
    Artifact,
    check_run,
    finish,
    installed_versions,
    partial_dir,
    publish,
    recover,
    sha256_file,
    sha256_json,
    write_json,
)
from rlhf.data import data_fingerprint, lineage, load_data_recipe, load_rows, prepared
from rlhf.errors import UserError
from rlhf.locks import locked
from rlhf.recipe import Recipe
from rlhf.redact import redact_tree

if TYPE_CHECKING:
    from accelerate import PartialState

logger = logging.getLogger(__name__)

FULL = 2**20  # bytes free on a disk that is as good as full
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "evaluate", "rlhf-accelerate")


@dataclass(frozen=True)
class Stage:
    """What one stage reads and how it builds.

    Attributes:
        name: folder name of its artifact and its section in the recipe.
        version: raised when the code changes what the stage produces; part of the fingerprint.
        inputs: artifacts it reads, as names of stages of the same run or paths.
        data: names of the data recipes it reads.
        check: raises UserError for whatever can be known before a model is loaded.
        build: writes the artifact's files into `ctx.dir` and returns the manifest's stage-specific part.
        also: settings of other sections that the result depends on; part of the fingerprint.
        found: further artifacts that it reads where they are there, after `inputs` are loaded; inputs like the others.
        headline: metrics shown when the stage is done.
        folder: of its artifact where that is not its name: a second reward model of one run.
    """

    name: str
    version: int
    inputs: Callable[[Recipe], list[str]]
    data: Callable[[Recipe], list[str]]
    check: Callable[[StageContext], None]
    build: Callable[[StageContext], dict[str, Any]]
    also: Callable[[Recipe], dict[str, Any]] = lambda recipe: {}
    found: Callable[[StageContext], list[str]] = lambda ctx: []
    headline: tuple[str, ...] = ()
    folder: str | None = None


@dataclass
class StageContext:
    """What a running stage knows.

    Attributes:
        stage, recipe: what runs.
        root: the artifact directory.
        run: folder of the run below it.
        inputs: artifacts by the name that the recipe gives them.
        fingerprint: of what is being built.
        resumed: whether an interrupted attempt is continued.
        continued: changes of process count, device, threads or packages between the attempts that made it.
    """

    stage: Stage
    recipe: Recipe
    root: Path
    run: str
    inputs: dict[str, Artifact] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    resumed: bool = False
    continued: list[str] = field(default_factory=list)

    @property
    def final(self) -> Path:
        """Place of the finished artifact."""
        return self.root / self.run / (self.stage.folder or self.stage.name)

    @property
    def dir(self) -> Path:
        """Folder that the stage builds in."""
        return partial_dir(self.final)

    @property
    def checkpoints(self) -> Path:
        """Training state for resume; pruned before the stage is published."""
        return self.dir / CHECKPOINTS

    @property
    def seed(self) -> int:
        """Seed of this stage."""
        return self.recipe.stage_seed(self.stage.name)

    def rows(self, data: str, split: str, kind: str, limit: int | None = None, seed: int | None = None) -> list[dict]:
        """Rows of a data recipe; cleaned ones come from the set below the artifact directory (`load_rows`)."""
        return load_rows(load_data_recipe(data), split, kind, limit, seed, self.root)

    def resolve(self, reference: str) -> Path:
        """Path of an input: a stage of this run by name, or any path."""
        return self.root / self.run / reference if _is_stage_name(reference) else Path(reference)


def _is_stage_name(reference: str) -> bool:
    return os.sep not in reference and not reference.startswith(".")


def is_main_process() -> bool:
    """Rank 0 of a launch, known from the environment alone (before torch is imported)."""
    return int(os.environ.get("RANK", "0")) == 0


def fingerprint(stage: Stage, ctx: StageContext) -> dict[str, Any]:
    """Everything that decides what the stage produces, and nothing else."""
    recipe = ctx.recipe
    section = redact_tree(recipe.section(stage.name).identity())
    peft = recipe.peft.model_dump(mode="json") if recipe.uses_peft(stage.name) and recipe.peft else None
    return {
        "stage": stage.name,
        "version": stage.version,
        "section": section,
        "also": stage.also(recipe),
        "model": redact_tree(recipe.model.model_dump(mode="json")),
        "chat_template": _file_hash(recipe.model.chat_template),
        "peft": peft,
        "precision": recipe.hardware.precision,
        "seed": ctx.seed,
        "inputs": {name: artifact.hash for name, artifact in ctx.inputs.items()},
        "data": {name: data_fingerprint(load_data_recipe(name)) for name in sorted(set(stage.data(recipe)))},
    }


def _file_hash(path: str | None) -> str | None:
    return sha256_file(Path(path)) if path and Path(path).is_file() else None


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs between two fingerprints."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if old == new else [f"{prefix} {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def load_inputs(ctx: StageContext, missing_ok: bool = False) -> None:
    """Load the manifests of the inputs.

    Args:
        missing_ok: report an input that is not built yet instead of raising (dry run).

    Raises:
        UserError: the stage is out of order, or an input is unfinished or damaged.
    """
    for reference in ctx.stage.inputs(ctx.recipe):
        path = ctx.resolve(reference)
        if missing_ok and not path.is_dir():
            logger.info("input %s: not built yet", path)
            continue
        if not path.is_dir() and _is_stage_name(reference):
            named = "" if reference in Recipe.model_fields else "reward REWARD="
            raise UserError(
                f"stage {ctx.stage.name}: needs {path}, which is not there: run `make {named}{reference}` first "
                f"(same RUN and ARTIFACTS)"
            )
        ctx.inputs[reference] = Artifact.load(path)
    for reference in ctx.stage.found(ctx):
        ctx.inputs[reference] = Artifact.load(ctx.resolve(reference))


def check_lineage(ctx: StageContext) -> None:
    """Inputs must speak the same tokens: one tokenizer and one chat template along the chain.

    Raises:
        UserError: two inputs differ in tokenizer or chat template, or pad and EOS are one token.
    """
    first: Artifact | None = None
    for reference, artifact in ctx.inputs.items():
        tokens = artifact.manifest.get("tokenizer")
        if tokens is None:
            continue
        if tokens["pad_id"] == tokens["eos_id"]:
            raise UserError(
                f"artifact {reference}: pad and eos are both token {tokens['eos_id']}, which hides the real EOS: "
                "set model.pad_token and redo sft"
            )
        if first is None:
            first = artifact
            continue
        mine = first.manifest["tokenizer"]
        for key, what in (("hash", "tokenizer"), ("chat_template_hash", "chat template")):
            if mine[key] != tokens[key]:
                raise UserError(
                    f"artifact {reference}: its {what} ({str(tokens[key])[:12]}) is not that of {first.stage} "
                    f"({str(mine[key])[:12]}): redo {reference} from this run's {first.stage}"
                )


def stale_inputs(ctx: StageContext) -> list[str]:
    """Inputs of this run that the recipe at hand would build differently."""
    stale = []
    for reference, artifact in ctx.inputs.items():
        if not _is_stage_name(reference):
            continue
        recorded, section = artifact.manifest["fingerprint"], getattr(ctx.recipe, reference, None)
        if section is None:  # built by another recipe of this run
            continue
        changed = differences(recorded["section"], redact_tree(section.identity()))
        changed += differences(recorded["model"], redact_tree(ctx.recipe.model.model_dump(mode="json")), "model")
        if changed:
            stale.append(f"{reference} ({'; '.join(changed[:3])})")
    return stale


def outdated_inputs(ctx: StageContext) -> Iterator[tuple[str, str]]:
    """Inputs of this run, and what each was made from that is another one by now."""
    for reference, artifact in ctx.inputs.items():
        for name, digest in artifact.manifest["inputs"].items() if _is_stage_name(reference) else ():
            if name in ctx.inputs and ctx.inputs[name].hash != digest:
                yield reference, name


def plan(ctx: StageContext, force: bool) -> str:
    """What would happen: skip, build, rebuild or resume.

    A `.partial` without a checkpoint has nothing to continue and nothing to lose: it is begun again, by any recipe.

    Raises:
        UserError: a `.partial` of another fingerprint is in the way.
    """
    ctx.fingerprint = fingerprint(ctx.stage, ctx)
    if ctx.final.is_dir() and not force:
        artifact = Artifact.load(ctx.final)
        changed = differences(artifact.manifest["fingerprint"], ctx.fingerprint)
        changed += [f"{name} is missing" for name in artifact.missing()]
        if not changed:
            return "skip"
        logger.info("%s: rebuilding, because %s", ctx.final, "; ".join(changed[:5]))
    marker = ctx.dir / FINGERPRINT
    if not resumable(ctx) or force:
        return "rebuild" if ctx.final.is_dir() else "build"
    try:
        started = json.loads(marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return "build"  # nobody knows what its checkpoints are of
    changed = differences(started, ctx.fingerprint)
    if changed:
        raise UserError(
            f"{ctx.dir}: an interrupted {ctx.stage.name} of another recipe is there ({'; '.join(changed[:3])}): "
            "run it with its old settings to continue, or FORCE=1 to discard it"
        )
    return "resume"


def run_stage(
    stage: Stage, recipe: Recipe, root: Path, run: str | None = None, force: bool = False, dry_run: bool = False
) -> Artifact | None:
    """Run `stage` of `recipe` below `root`; returns its artifact (None on a dry run).

    Raises:
        UserError: bad input, inputs that are missing, damaged or do not fit together.
    """
    ctx = StageContext(stage, recipe, Path(root), check_run(run or recipe.name))
    recipe.section(stage.name)
    if dry_run:
        return _run(ctx, force, dry_run)
    with locked(ctx.final.with_name(f"{ctx.final.name}.lock")) if is_main_process() else nullcontext():
        return _run(ctx, force, dry_run)


def _run(ctx: StageContext, force: bool, dry_run: bool) -> Artifact | None:
    stage, recipe = ctx.stage, ctx.recipe
    if is_main_process() and not dry_run:
        recover(ctx.final)
    if not dry_run and "LOCAL_RANK" in os.environ:
        _process_state(recipe).wait_for_everyone()  # every rank plans from what the recovery left
    load_inputs(ctx, missing_ok=dry_run)
    check_lineage(ctx)
    action = plan(ctx, force)
    if action == "skip" and not dry_run:
        logger.info("%s: unchanged, skipped (FORCE=1 redoes it)", ctx.final)
        return Artifact.load(ctx.final)
    allow_remote_code(recipe)
    if dry_run:
        describe(ctx, action)
        return None
    for stale in stale_inputs(ctx):
        logger.warning("input %s was built with other settings than this recipe's", stale)
    for name, source in outdated_inputs(ctx):
        logger.warning("input %s: it was made from another %s than the one that is there now: redo it", name, source)
    if is_main_process():
        for artifact in ctx.inputs.values():
            artifact.verify()
    stage.check(ctx)
    if is_main_process():
        for name, error in later_data(ctx):
            logger.warning("%s.data: %s: the stage %s will stop there", name, error, name)
    return _build(ctx, action)


def later_data(ctx: StageContext) -> Iterator[tuple[str, str]]:
    """Stages to come whose data recipe is not there, and why: better said before this one trains."""
    for name in STAGES[STAGES.index(ctx.stage.name) + 1 :] if ctx.stage.name in STAGES else ():
        data = getattr(getattr(ctx.recipe, name, None), "data", None)
        try:
            if data is not None:
                load_data_recipe(data)
        except UserError as error:
            yield name, str(error)


def allow_remote_code(recipe: Recipe) -> None:
    """Let models of this run execute Python code that they ship, or forbid it, and say so aloud."""
    from rlhf import models

    models.trust_remote_code = recipe.model.trust_remote_code
    if recipe.model.trust_remote_code:
        logger.warning(
            "model.trust_remote_code is on: Python code that ships with %s runs on this machine, in every stage",
            recipe.model.base,
        )


def _process_state(recipe: Recipe) -> PartialState:
    import torch
    from accelerate import PartialState

    # Without a GPU `PartialState()` does not notice a launch of several processes: each would take itself for rank 0.
    on_cpu = recipe.hardware.device == "cpu" or not torch.cuda.is_available()
    # Rank 0 measures and publishes while the others wait: longer than the ten minutes that NCCL would give it.
    return PartialState(cpu=on_cpu, timeout=timedelta(hours=6))


def _build(ctx: StageContext, action: str) -> Artifact:
    from accelerate.utils import set_seed

    started = time.perf_counter()
    state = _process_state(ctx.recipe)
    state.wait_for_everyone()
    ctx.resumed = action == "resume"
    logger.info("%s: %s", ctx.final, "resuming" if ctx.resumed else "starting")
    with nothing_half_written(ctx, state.is_main_process):
        if state.is_main_process:
            _prepare_dir(ctx, action)
            for name in sorted(set(ctx.stage.data(ctx.recipe))):
                prepared(load_data_recipe(name), ctx.root)
        state.wait_for_everyone()
        set_seed(ctx.seed)  # some libraries draw initial weights before they seed anything
        result = ctx.stage.build(ctx)
        state.wait_for_everyone()
        if state.is_main_process:
            finish(ctx.dir, _manifest(ctx, result, time.perf_counter() - started))
            publish(ctx.dir, ctx.final)
            _report(ctx, result, time.perf_counter() - started)
    state.wait_for_everyone()
    return Artifact.load(ctx.final)


def _report(ctx: StageContext, result: dict[str, Any], seconds: float) -> None:
    metrics = result.get("metrics", {})
    shown = [f"{name} {metrics[name]:.3g}" for name in ctx.stage.headline if name in metrics]
    logger.info("%s: done in %.0f s%s", ctx.final, seconds, f" ({', '.join(shown)})" if shown else "")


def resumable(ctx: StageContext) -> bool:
    """Whether `.partial` holds something to resume or to publish."""
    return (ctx.dir / MANIFEST).is_file() or (ctx.checkpoints.is_dir() and any(ctx.checkpoints.iterdir()))


@contextmanager
def nothing_half_written(ctx: StageContext, main: bool) -> Iterator[None]:
    """On an error, leave `.partial` only where there is something to resume or to publish.

    Libraries have errors of their own for a vanished input, a full disk or a read-only folder: said as what they are.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (UserError, OSError, RuntimeError, MemoryError, ValueError, SafetensorError) as error:
        worth_keeping = resumable(ctx)
        if main and not worth_keeping:
            shutil.rmtree(ctx.dir, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        for artifact in ctx.inputs.values():
            if not (artifact.path / MANIFEST).is_file():
                raise UserError(
                    f"{ctx.stage.name}: its input {artifact.path} vanished while it ran: put it back or redo it, then "
                    f"run {ctx.stage.name} again{' to continue' if worth_keeping else ''}"
                ) from error
        number = _disk_error(ctx, error)
        if number and not isinstance(error, OSError):
            raise OSError(number, os.strerror(number), str(ctx.root)) from error
        raise


def _disk_error(ctx: StageContext, error: Exception) -> int | None:
    """The errno that a library's error stands for."""
    if "Permission denied" in str(error):
        return errno.EACCES
    if "Read-only file system" in str(error):
        return errno.EROFS
    full = "No space left" in str(error) or (ctx.root.exists() and shutil.disk_usage(ctx.root).free < FULL)
    return errno.ENOSPC if full else None


# What a resumed stage goes on with; everything else in `.partial` is written again.
CONTINUES = (CHECKPOINTS, FINGERPRINT, "metrics.jsonl", "samples.jsonl", "tensorboard", "bad_batches")


def _prepare_dir(ctx: StageContext, action: str) -> None:
    if action == "resume" and ctx.checkpoints.is_dir():
        for path in ctx.dir.iterdir():
            if path.name not in CONTINUES:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    shutil.rmtree(ctx.dir, ignore_errors=True)
    ctx.dir.mkdir(parents=True)
    write_json(ctx.dir / FINGERPRINT, ctx.fingerprint)


def _manifest(ctx: StageContext, result: dict[str, Any], seconds: float) -> dict[str, Any]:
    recipe = redact_tree(ctx.recipe.model_dump(mode="json"))
    return {
        "stage": ctx.stage.name,
        "run": ctx.run,
        "status": "complete",
        "recipe": recipe,
        "recipe_hash": sha256_json(recipe),
        "fingerprint": ctx.fingerprint,
        "inputs": {name: artifact.hash for name, artifact in ctx.inputs.items()},
        "data": {name: lineage(load_data_recipe(name)) for name in sorted(set(ctx.stage.data(ctx.recipe)))},
        "seed": ctx.seed,
        "git_commit": git_commit(),
        "packages": package_versions(),
        "hardware": hardware(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(seconds, 2),
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "continued": ctx.continued,
        **result,
    }


def git_commit() -> str | None:
    """Commit of the code, with `+changes` when the tree is not clean; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide results, and of Python."""
    return {"python": platform.python_version()} | installed_versions(PACKAGES)


def hardware() -> dict[str, Any]:
    """What the stage ran on."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),  # sums go in another order with other vector instructions
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": gpus,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: of the GPU where one was used, else resident memory."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux


def describe(ctx: StageContext, action: str) -> None:
    """Log the resolved recipe, the fingerprint, the plan and a memory estimate (`--dry-run`)."""
    import yaml

    from rlhf.memory import estimate

    recipe = redact_tree(ctx.recipe.model_dump(mode="json"))
    logger.info("resolved recipe:\n%s", yaml.safe_dump(recipe, sort_keys=False).rstrip())
    logger.info("fingerprint: %s", sha256_json(ctx.fingerprint))
    verb = {"skip": "be skipped: unchanged", "build": "be built", "rebuild": "be rebuilt", "resume": "be resumed"}
    logger.info("%s would %s", ctx.final, verb[action])
    for line in estimate(ctx):
        logger.info("memory: %s", line)
