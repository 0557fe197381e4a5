"""What the entry points share: arguments, logging, and one line for bad input."""

from __future__ import annotations

import argparse
import atexit
import ctypes
import errno
import importlib
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from rlhf import interrupt
from rlhf.artifacts import Artifact, check_name
from rlhf.errors import UserError
from rlhf.redact import RedactingFormatter, redact

BAD_INPUT = 2
OPTIONAL = ("pretrain", "evaluate")  # `make sft` and `make ppo` call these for every recipe
ALSO = "`peft: {r: 16}` needs far less; --dry-run estimates it"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
logger = logging.getLogger("rlhf")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{self.prog}: {message}: --help lists the arguments")


def parse(stage: str, argv: list[str] | None) -> argparse.Namespace:
    """Arguments of a stage.

    Raises:
        UserError: an unknown option, or one without its value.
    """
    parser = Parser(prog=f"python -m pipelines.{stage}", description=f"Run the {stage} stage of a recipe.")
    parser.add_argument("--recipe", default="tiny", metavar="NAME-OR-PATH", help="shipped recipe or YAML file (tiny)")
    parser.add_argument("--artifacts", default="artifacts", metavar="DIR", help="artifact directory (artifacts)")
    parser.add_argument("--run", metavar="NAME", help="folder of the run (the recipe's name)")
    parser.add_argument("--force", action="store_true", help="redo a finished stage, discard an interrupted one")
    parser.add_argument("--dry-run", action="store_true", help="print the recipe, the plan and a memory estimate")
    if stage in ("reward", "report"):
        parser.add_argument("--as", dest="folder", metavar="NAME", help="another reward model of the run: reward_b")
    if stage == "report":
        parser.add_argument(
            "--stage", choices=["reward"], help="measure the reward model again first; settings ask for it, too"
        )
        parser.add_argument("--against", metavar="RUN", help="another run (or its path): differences and its curves")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as ppo.kl_coef=0.1")
    return parser.parse_intermixed_args(argv)


class BesideBars(logging.StreamHandler):
    """Writes a line where a progress bar is under way: the bar is taken away, and drawn again below it."""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging."""
        bars = sys.modules.get("tqdm.std")
        with bars.tqdm.external_write_mode(file=self.stream) if bars else nullcontext():
            super().emit(record)


def setup_logging() -> None:
    """Our lines on rank 0: what happens to stdout, what is wrong to stderr. Libraries only when something is wrong."""
    rank = int(os.environ.get("RANK", "0"))
    out, err = BesideBars(sys.stdout), BesideBars(sys.stderr)
    out.addFilter(lambda record: record.levelno < logging.WARNING)
    err.setLevel(logging.WARNING)
    for handler in (out, err):
        handler.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(handlers=[out, err], level=logging.WARNING)
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of tied weights at every checkpoint
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Could not find a config file")  # peft, of a base that is a GGUF file
    sys.excepthook = hide_secrets
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def hide_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own report of an error that nobody caught, without the secrets that its message may quote."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks instead of returning each tensor to the kernel (Linux; elsewhere nothing happens).

    By default every tensor above 32 MB is mapped afresh and its pages are faulted in again: measured on two cores, a
    training step of the `tiny` recipe took 0.90 s so, and 0.41 s with this.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def main(
    stage: str,
    module: str,
    argv: list[str] | None = None,
    show: Callable[[Artifact], None] | None = None,
    act: Callable[[argparse.Namespace], Artifact | None] | None = None,
) -> int:
    """Run one stage; returns the exit code: 0, or after one line on stderr 2 (bad input), 143 (SIGTERM), 130 (SIGINT).

    Args:
        stage: name of the stage.
        module: module that holds its `STAGE`.
        argv: arguments; None = the command line's.
        show: prints what a person wants to see of the finished artifact, on rank 0.
        act: what is done with the arguments; None = run the stage.
    """
    setup_logging()
    keep_freed_memory()
    try:
        args = parse(stage, argv)
        with interrupt.handled():
            artifact = act(args) if act else _run(stage, module, args)
        if artifact is not None and show is not None and int(os.environ.get("RANK", "0")) == 0:
            show(artifact)
    except UserError as error:
        return fail(str(error))
    except interrupt.Interrupted as stop:
        name = signal.Signals(stop.number).name
        fail(f"{stage}: {stop}: run the same command again to continue", f"stopped by {name}")
        return 128 + stop.number
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return fail(f"{stage}: the disk is full ({error.filename or args.artifacts}): free space and run it again")
        no_root = error.errno == errno.ENOENT and str(error.filename or "").startswith(args.artifacts)
        if no_root or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            where = error.filename or args.artifacts
            return fail(f"{stage}: cannot write {where} ({error.strerror}): check path and permissions")
        raise
    except (RuntimeError, MemoryError) as error:
        if (reason := out_of_memory(error)) is None:
            raise
        where = f"{stage}, process {os.environ['RANK']}" if "RANK" in os.environ else stage
        return fail(f"{where}: out of memory ({reason}): {less_at_a_time(stage)}{less_waste(reason)}", everywhere=True)
    finally:
        leave_group()
    return 0


def out_of_memory(error: BaseException) -> str | None:
    """What torch says of memory that it did not get, without its advice; None for any other error."""
    text = " ".join(str(error).split()) or type(error).__name__
    # A GPU that is full while a graph is recorded is no OutOfMemoryError; the last one is a CPU's.
    if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", text):
        return None
    said = re.match(r".*? is free\b", text)
    return said[0] if said else text.split(". ")[0][:160]


def less_at_a_time(stage: str) -> str:
    """What to set where a stage needs more memory than there is."""
    if stage == "ppo":
        return (
            "lower ppo.max_tokens_per_micro_batch (the updates stay what they are), then ppo.generation_slots; " + ALSO
        )
    if stage in ("pretrain", "sft", "reward"):
        size, steps = (
            f"{stage}.trainer.{key}" for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        return f"halve {size} and double {steps} (the same steps); {ALSO}"
    return "let other programs end, or take a machine with more"


def less_waste(reason: str) -> str:
    """What a GPU's allocator can be told, unless it is."""
    told = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    if "CUDA" not in reason or "expandable_segments" in told:
        return ""
    return "; or have expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF, which leaves less memory unused"


def leave_group() -> None:
    """End the process group, if there is one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Exit with this code; one of several processes does so without the interpreter's own end.

    DDP's reducer holds the process group past `destroy_process_group`. A thread of gloo that still has a tensor of the
    last collective to free when the interpreter ends aborts the process ("terminate called without an active
    exception", torch 2.13: one process in eight with the group left to itself, one in sixty with it destroyed).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()  # loggers, trackers, workers of data loaders
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(stage_name: str, module: str, args: argparse.Namespace) -> Artifact | None:
    from rlhf.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if stage_name in OPTIONAL and getattr(recipe, stage_name) is None:
        logger.info("%s: recipe %s has no such stage, nothing to do", stage_name, recipe.name)
        return None
    from rlhf.stage import run_stage  # torch only after the recipe has been read

    stage = importlib.import_module(module).STAGE
    if getattr(args, "folder", None):
        stage = replace(stage, folder=check_folder(args.folder))
    return run_stage(stage, recipe, Path(args.artifacts), args.run, args.force, args.dry_run)


def check_folder(name: str) -> str:
    """The folder of another reward model, which no other stage's may be.

    Raises:
        UserError: it does not begin with `reward`, or is no plain name.
    """
    if not name.startswith("reward"):
        raise UserError(f"--as {name}: does not begin with `reward`: name it reward_b, reward_1 or the like")
    return check_name(name, "--as")


def guarded(command: str, act: Callable[[argparse.Namespace], None], parser: Parser, argv: list[str] | None) -> int:
    """Parse and do what is no stage; returns the exit code: 0, or 2 after one line on stderr."""
    setup_logging()
    try:
        act(parser.parse_args(argv))
    except UserError as error:
        return fail(str(error))
    except OSError as error:
        where = error.filename or "a file"
        return fail(f"{command}: cannot read or write {where} ({error.strerror}): check path and space")
    return 0


def fail(message: str, kind: str = "error", everywhere: bool = False) -> int:
    """Print one line on stderr, on rank 0 or `everywhere`; returns the exit code of bad input."""
    bars = sys.modules.get("tqdm.std")
    for bar in list(bars.tqdm._instances) if bars else []:
        bar.close()  # ends its line: the message begins one of its own
    if everywhere or int(os.environ.get("RANK", "0")) == 0:
        print(f"{kind}: " + redact(" ".join(message.split())), file=sys.stderr)
    return BAD_INPUT
