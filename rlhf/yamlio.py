"""Reading what people write: YAML files, values on the command line, and typed models of both.

YAML here means the YAML 1.2 core schema, which is what people expect of a recipe: `1e-5` is a number, `no` and
`2026-01-01` are strings, `010` is ten. PyYAML's own loader follows YAML 1.1 in all of these, and it silently keeps the
last of two equal keys.
"""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rlhf.errors import UserError

ModelT = TypeVar("ModelT", bound=BaseModel)

_MAX_SHOWN = 80  # characters of an offending value that an error line quotes


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core scalars and without duplicate keys."""

    # A fresh table: SafeLoader's holds the YAML 1.1 scalars.
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        # Before merge keys (`<<`) are folded in, since overriding a merged key is what they are for.
        seen: dict[tuple[str, str], int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key = (key_node.tag, key_node.value)
            if key in seen:
                message = f"duplicate key {key_node.value!r} (first on line {seen[key]}); keep one of them"
                raise yaml.MarkedYAMLError(problem=message, problem_mark=key_node.start_mark)
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


_SCALARS = {  # tag -> (pattern, the first characters it can have)
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "tag:yaml.org,2002:merge": (r"<<", ["<"]),
}
for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))


def _load(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number that a YAML tag promised and int() refused
        raise UserError(f"{where}: not valid YAML: {_one_line(error)}") from error


def read_yaml(path: str | Path) -> dict:
    """Reads a YAML file whose top level is a mapping.

    Args:
        path: the file, UTF-8.

    Returns:
        The mapping; an empty file gives an empty one.

    Raises:
        UserError: no such file, not UTF-8, a syntax error, a duplicate key (each with its line), or no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
    data = _load(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: the top level is {_shown(data)}; write `key: value` lines instead")
    return data


def parse_scalar(text: str) -> Any:
    """Reads one value as a YAML file would: `1e-5`, `true`, `null`, `abc`, `[1, 2]`, `{artifact: reward}`.

    Args:
        text: what stands right of the `=` in a dotted override; the empty text is null, as in YAML.

    Raises:
        UserError: `text` is not valid YAML.
    """
    return _load(text, f"value {text!r}")


def nearest(name: Any, known: typing.Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the known name most like `name`, or the empty string."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def validate(model_cls: type[ModelT], data: Any, where: str) -> ModelT:
    """Builds `model_cls` from plain data, with errors that a person can act on.

    Args:
        model_cls: a pydantic model.
        data: what `read_yaml` returned, overrides applied.
        where: the file or the like, put in front of the message.

    Raises:
        UserError: one line with the dotted key, the value seen and what is allowed; for an unknown key, the
            nearest known one.
    """
    try:
        return model_cls.model_validate(data)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for item in error.errors(include_url=False):
            path, problem = _describe(model_cls, data, item)
            problems.setdefault(path, []).append(problem)
        key, said = next(iter(problems.items()))
        # A union reports one error per member; only what each member wants differs.
        alternatives = list(dict.fromkeys([said[0], *(text.partition("; must be ")[2] or text for text in said[1:])]))
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(_one_line(f"{where}: {key + ': ' if key else ''}{' or '.join(alternatives)}{more}")) from error


def _describe(model_cls: type[BaseModel], data: Any, item: Any) -> tuple[str, str]:
    """Turns one pydantic error into (dotted key as the user wrote it, what is wrong with it)."""
    loc, kind = item["loc"], item["type"]
    key = _user_path(data, loc)
    if kind == "missing":
        return f"{key}.{loc[-1]}".lstrip("."), "required, but missing"
    if kind == "extra_forbidden":
        known = _known_names(model_cls, loc[:-1])
        allowed = nearest(loc[-1], known) or f"; known keys: {', '.join(sorted(known))}"
        return key, f"unknown key{allowed}"
    if kind in ("value_error", "assertion_error"):
        return key, str(item["ctx"]["error"])
    said = item["msg"].replace("Input should be", "must be")
    hint = ""
    if kind == "literal_error" and isinstance(item["input"], str):
        hint = nearest(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    return key, f"{_shown(item['input'])} is not allowed; {said}{hint}"


def _user_path(data: Any, loc: tuple) -> str:
    """The dotted path of `loc` within `data`, without the union tags that pydantic puts between."""
    parts, at = [], data
    for part in loc:
        in_list = isinstance(at, list) and isinstance(part, int) and part < len(at)
        if in_list or (isinstance(at, dict) and part in at):
            parts.append(str(part))
            at = at[part]
    return ".".join(parts)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every model class that an annotation can hold, whether optional, in a union, a list or a dict."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        args = args[:1]
    return [model for arg in args for model in models_in(arg)]


def _known_names(model_cls: type[BaseModel], loc: tuple) -> set[str]:
    """The field names of the model that `loc` points at; a tag equal to a class name picks one class of a union."""
    models = [model_cls]
    for part in loc:
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if fields:
            models = [model for annotation in fields for model in models_in(annotation)]
        else:
            models = [m for m in models if m.__name__ == part] or models
    return {info.alias or name for model in models for name, info in model.model_fields.items()}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
