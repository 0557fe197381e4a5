"""User-supplied functions of text: `package.module:callable`, for rewards and judges alike."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.artifacts import sha256_file
from rlhf.errors import UserError

TextFunction = Callable[..., Any]  # (prompts, responses, **some_columns) -> floats

_OWN = ("prompts", "responses")


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
) -> list[float]:
    """Calls a user's function of texts and checks what comes back.

    `prompts` and `responses` go by keyword where the function has parameters of these names, else as its first two
    arguments. Of `columns` it gets those that it has a parameter for (all of them with `**kwargs`), by keyword.

    Args:
        function: `function(prompts, responses, **some_columns) -> floats`.
        prompts: [B] strings.
        responses: [B] strings.
        columns: further dataset columns, [B] entries each.

    Returns:
        [B] finite floats.

    Raises:
        UserError: inputs of different lengths, a parameter that no column fills, not B numbers, a number not finite.
    """
    name = function_name(function)
    columns = dict(columns or {})
    for what, values in {"responses": responses, **columns}.items():
        if len(values) != len(prompts):
            raise UserError(f"function {name}: {len(values)} {what} for {len(prompts)} prompts; give one per prompt")
    args, kwargs = _arguments(function, name, list(prompts), list(responses), columns)
    return _checked_floats(name, function(*args, **kwargs), len(prompts))


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


def _checked_floats(name: str, returned: Any, expected: int) -> list[float]:
    if isinstance(returned, (str, bytes, Mapping)) or not hasattr(returned, "__iter__"):
        raise UserError(f"function {name}: returned a {type(returned).__name__}; return a list of {expected} floats")
    values = list(returned)
    if len(values) != expected:
        raise UserError(f"function {name}: returned {len(values)} values for {expected} prompts; return one per prompt")
    floats = []
    for index, value in enumerate(values):
        try:
            number = math.nan if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"function {name}: value {index} is {value!r}; return finite floats only")
        floats.append(number)
    return floats
