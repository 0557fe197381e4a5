"""User-supplied functions of text: `package.module:callable`, for rewards and judges alike."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf.artifacts import sha256_file
from rlhf.errors import UserError

TextFunction = Callable[..., Any]  # (prompts, responses, **some_columns) -> floats

_OWN = ("prompts", "responses")
_SHOWN = 60  # characters of a prompt or value that an error line quotes


def load_function(spec: str) -> Callable[..., Any]:
    """Imports `package.module:callable`; the working directory is importable.

    An error inside the imported module keeps its traceback: it is a bug in that file, and the line number is the help.

    Args:
        spec: dotted module, a colon, and a (possibly dotted) attribute, e.g. `my_rewards:politeness`.

    Raises:
        UserError: malformed spec, no such module or attribute, not callable.
    """
    module_name, colon, attribute_path = spec.partition(":")
    parts = [*module_name.split("."), *attribute_path.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise UserError(f"function {spec!r}: not of the form package.module:callable; write e.g. my_rewards:politeness")
    target = _import(module_name, spec)
    for name in attribute_path.split("."):
        if not hasattr(target, name):
            raise UserError(f"function {spec!r}: {module_name} has no attribute {attribute_path!r}; check its spelling")
        target = getattr(target, name)
    if not callable(target):
        raise UserError(f"function {spec!r}: it is a {type(target).__name__}, not callable; name a function")
    return target


def source_hashes(specs: Sequence[str | None]) -> dict[str, str | None]:
    """sha256 of the file that holds each `module:callable`; None where there is none. Nothing is imported.

    Part of a stage's fingerprint: an edited reward function makes what it rewarded stale.
    """
    hashes: dict[str, str | None] = {}
    for spec in specs:
        if spec is None:
            continue
        path = _source_file(spec.partition(":")[0])
        hashes[spec] = sha256_file(path) if path is not None else None
    return hashes


def _source_file(module: str) -> Path | None:
    """Where the module's source is: below the working directory, or on the import path."""
    relative = Path(*module.split("."))
    for root in (str(Path.cwd()), *sys.path):
        for path in (Path(root) / relative.with_suffix(".py"), Path(root) / relative / "__init__.py"):
            if path.is_file():
                return path
    return None


def call_text_function(
    function: Callable[..., Any],
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
    timeout: float | None = None,
) -> list[float]:
    """Calls a user's function of texts and checks what comes back.

    `prompts` and `responses` go by keyword where the function has parameters of these names, else as its first two
    arguments. Of `columns` it gets those that it has a parameter for (all of them with `**kwargs`), by keyword.

    Args:
        function: `function(prompts, responses, **some_columns) -> floats`.
        prompts: [B] strings.
        responses: [B] strings.
        columns: further dataset columns, [B] entries each.
        timeout: seconds that the call may take; None = no limit. See `time_limit`.

    Returns:
        [B] finite floats.

    Raises:
        UserError: inputs of different lengths, a parameter that no column fills, an exception in the function, no end
            within the time limit, not B numbers, a number not finite. It quotes the prompt, where one is to blame.
    """
    name = function_name(function)
    columns = dict(columns or {})
    for what, values in {"responses": responses, **columns}.items():
        if len(values) != len(prompts):
            raise UserError(f"function {name}: {len(values)} {what} for {len(prompts)} prompts; give one per prompt")

    def call(rows: Sequence[int]) -> Any:
        texts = [prompts[row] for row in rows], [responses[row] for row in rows]
        args, kwargs = _arguments(
            function, name, *texts, {key: [values[row] for row in rows] for key, values in columns.items()}
        )
        returned = function(*args, **kwargs)
        return list(returned) if isinstance(returned, Iterator) else returned  # a generator runs here, too

    outcome = _attempt(call, range(len(prompts)), timeout)
    if isinstance(outcome.error, UserError):
        raise outcome.error
    if isinstance(outcome.error, TimeLimit):
        raise UserError(
            f"function {name}: no answer within {timeout:g} seconds, {_batch(prompts)}: make it faster, give it a time "
            "limit of its own, or raise ppo.reward_timeout"
        ) from outcome.error
    if outcome.error is not None:
        blamed = [prompts[row] for row in _offender(call, range(len(prompts)), timeout)]
        raise UserError(
            f"function {name}: raised {type(outcome.error).__name__}: {_short(str(outcome.error))}"
            f"{_place(outcome.error)}, {_batch(blamed)}: correct the function"
        ) from outcome.error
    return _checked_floats(name, outcome.value, prompts)


class TimeLimit(BaseException):
    """A user's function took too long. No `Exception`, so that its own error handling does not swallow it."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeLimit in the body when it takes longer than `seconds`.

    By SIGALRM, and not by calling the function in another thread: reward functions that use signals themselves (as
    math-verify does), a GPU's current device or torch's grad mode work in the main thread alone, and a thread that
    hangs could not be ended. The price: it does not end C code that never returns to Python, a function that sets the
    alarm itself takes ours away, and outside the main thread there is no limit.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Outcome:
    """What came of calling a user's function: a value or an error. Interrupts pass through."""

    value: Any = None
    error: BaseException | None = None

    def __enter__(self) -> _Outcome:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.error = error
        return isinstance(error, Exception | TimeLimit | SystemExit)


def _attempt(call: Callable[[Sequence[int]], Any], rows: Sequence[int], timeout: float | None) -> _Outcome:
    outcome = _Outcome()
    with outcome, time_limit(timeout):
        outcome.value = call(rows)
    return outcome


def _offender(call: Callable[[Sequence[int]], Any], rows: Sequence[int], timeout: float | None) -> Sequence[int]:
    """The row that makes a call fail, found by calling with halves; all rows where none fails alone."""
    suspects = rows
    while len(suspects) > 1:
        first, second = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
        suspects = first if _attempt(call, first, timeout).error else second
    return suspects if _attempt(call, suspects, timeout).error else rows


def _place(error: BaseException) -> str:
    """` (file.py line 3)`: where the function failed, its last line of Python."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""


def _batch(prompts: Sequence[str]) -> str:
    """The prompts of a call, for messages: the function got them all at once."""
    first = f"prompt {_short(prompts[0])!r}" if len(prompts) else "without prompts"
    return first if len(prompts) < 2 else f"{len(prompts)} prompts, the first is {_short(prompts[0])!r}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def function_name(function: Callable[..., Any]) -> str:
    """`module:qualified.name` for messages; the class's name for a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _import(module_name: str, spec: str) -> Any:
    # Appended, so that a user's file never shadows the standard library. It stays there: the user's module may import
    # its neighbours later, inside its functions.
    working_directory = str(Path.cwd())
    if not {"", working_directory} & set(sys.path):
        sys.path.append(working_directory)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise UserError(
                f"function {spec!r}: no module {missing!r} in {working_directory} or among the installed packages; "
                "run from the folder that holds it or install it"
            ) from error
        raise UserError(f"function {spec!r}: {module_name} imports {missing!r}, which is not installed") from error


def _arguments(
    function: Callable[..., Any], name: str, prompts: list[str], responses: list[str], columns: dict[str, Sequence[Any]]
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for the call, by the function's signature."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return [prompts, responses], {}
    parameters = signature.parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    args: list[Any] = []
    kwargs: dict[str, Any] = {"prompts": prompts, "responses": responses}
    if not by_keyword.issuperset(_OWN):
        args, kwargs = [prompts, responses], {}
        by_keyword -= set(list(signature.parameters)[:2])
    kwargs |= {c: v for c, v in columns.items() if c not in _OWN and (takes_any or c in by_keyword)}
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        have = ", ".join(columns) or "none"
        raise UserError(
            f"function {name}{signature}: cannot be called ({error}); it gets prompts, responses and the dataset "
            f"columns it names (available: {have})"
        ) from error
    return args, kwargs


def _checked_floats(name: str, returned: Any, prompts: Sequence[str]) -> list[float]:
    expected = len(prompts)
    if isinstance(returned, (str, bytes, Mapping)) or not hasattr(returned, "__iter__"):
        raise UserError(
            f"function {name}: returned a {type(returned).__name__} for {_batch(prompts)}: return a list of "
            f"{expected} floats"
        )
    values = list(returned)
    if len(values) != expected:
        raise UserError(
            f"function {name}: returned {len(values)} values for {expected} prompts ({_batch(prompts)}): return one "
            "per prompt"
        )
    floats = []
    for index, value in enumerate(values):
        try:
            number = math.nan if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several numbers
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"function {name}: value {index} is {_short(repr(value))}, for prompt {_short(prompts[index])!r}: "
                "return finite floats only"
            )
        floats.append(number)
    return floats
