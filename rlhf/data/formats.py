"""Formats: how a source row becomes a canonical row.

A format converts each row on its own to its *native* kind; `DERIVE` turns native rows into the kind a stage asks for.
To add a format, write one function `(row, options) -> native row` and add one entry to `FORMATS`.

Canonical rows, by kind:
    text        {"text": str}
    rated       {"text": str, "label": 0 or 1}
    sft         {"prompt": Prompt, "completion": str}
    thumbs      {"prompt": Prompt, "completion": str, "label": bool}
    scored      {"prompt": Prompt, "responses": [str], "scores": [float]}, at least two
    preference  {"prompt": Prompt, "chosen": str, "rejected": str}
    pairs       {"prompt": Prompt, "response_a": str, "response_b": str}: nobody has said which is better
    prompts     {"prompt": Prompt, ...}: the other columns of the source are kept, for reward functions
thumbs and scored are native only: stages ask for the others.
A Prompt is a str (plain text) or a list of {"role", "content"} messages with the roles system, user, assistant, tool.
Completion, chosen and rejected are always the last assistant turn alone.
"""

import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import UserError

Row = dict[str, Any]
Message = dict[str, str]
Prompt = str | list[Message]

KIND_COLUMNS: dict[str, tuple[str, ...] | None] = {
    "text": ("text",),
    "rated": ("text", "label"),
    "sft": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "pairs": ("prompt", "response_a", "response_b"),
    "prompts": None,  # all
}


class DropRow(Exception):
    """Raised by a converter for a row that cannot be used; counted by its reason."""


@dataclass(frozen=True)
class FormatOptions:
    """What converters may depend on; the recipe's fields of the same names."""

    prompt_style: str = "plain"
    prompt_template: str | None = None
    system: str | None = None
    score: str = "overall_score"
    prompt_words: int = 4
    pairs_per_row: int = 1
    keep: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """One way to write a row.

    Attributes:
        native: kind of what `convert` returns.
        required: columns that the source must have.
        optional: columns that are read where the source has them.
        convert: (row, options) -> native row; raises DropRow for a row without use and UserError for a wrong type.
        responses: native columns that the filters look at.
    """

    native: str
    required: tuple[str, ...]
    convert: Callable[[Row, FormatOptions], Row]
    responses: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column the format knows."""
        return self.required + self.optional


# --- pieces -----------------------------------------------------------------------------------------------------------

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def _string(row: Row, column: str) -> str:
    """A text column; numbers are taken as they would be printed, null and blank drop the row."""
    value = row.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DropRow(f"empty {column}")
    if not isinstance(value, str):
        raise UserError(f"column {column!r} holds {_shown(value)}, not text; check format and mapping")
    return value


def _content(value: Any, column: str) -> str:
    """A message's content: text, or the text parts of OpenAI's list form."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text") or "") for part in value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"column {column!r} holds the message content {_shown(value)}, not text; only text is supported"
        )
    return value


def _messages(row: Row, column: str, role_key: str = "role", content_key: str = "content") -> list[Message]:
    """A list of messages with the field's role names translated to ours."""
    value = row.get(column)
    if value is None or value == []:
        raise DropRow(f"empty {column}")
    if not isinstance(value, list):
        raise UserError(f"column {column!r} holds {_shown(value)}, not a list of messages; check format and mapping")
    return [_message(item, column, role_key, content_key) for item in value]


def _message(item: Any, column: str, role_key: str, content_key: str) -> Message:
    if not isinstance(item, dict) or role_key not in item or content_key not in item:
        raise UserError(
            f"column {column!r} holds the message {_shown(item)}; a message needs {role_key} and {content_key}"
        )
    role = _ROLES.get(str(item[role_key]).lower())
    if role is None:
        raise UserError(f"column {column!r} has the role {item[role_key]!r}; known: {', '.join(_ROLES)}")
    return {"role": role, "content": _content(item[content_key], column)}


def _system(row: Row, options: FormatOptions) -> str | None:
    """The row's own system message, or the recipe's."""
    return _content(row.get("system"), "system") or options.system


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    if system and not (messages and messages[0]["role"] == "system"):
        return [{"role": "system", "content": system}, *messages]
    return messages


def _prompt(text: str, options: FormatOptions) -> Prompt:
    """A single-turn text prompt as the recipe wants it."""
    if options.prompt_style == "human_assistant":
        messages = parse_human_assistant(text)
        if messages[-1]["role"] != "user":
            raise DropRow("prompt does not end with a human turn")
        return _with_system(messages, options.system)
    if options.system:
        return _with_system([{"role": "user", "content": text}], options.system)
    return options.prompt_template.replace("{prompt}", text) if options.prompt_template else text


def parse_human_assistant(text: str) -> list[Message]:
    r"""Parses `\n\nHuman: ...\n\nAssistant: ...` (the leading newlines may be missing) to messages.

    Contents are trimmed; two turns of one speaker in a row become one, since chat templates demand alternation.

    Raises:
        DropRow: the text does not start with a human turn.
    """
    text = text if text.startswith("\n\n") else "\n\n" + text
    lead, *turns = _HH_TURN.split(text)
    if lead.strip() or not turns or turns[0] != "Human":
        raise DropRow("dialogue does not start with 'Human:'")
    messages: list[Message] = []
    for speaker, said in zip(turns[::2], turns[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + said.strip()
        else:
            messages.append({"role": role, "content": said.strip()})
    return messages


def _answered(messages: list[Message], system: str | None) -> Row:
    """Cuts a conversation before its last assistant turn; one that ends with the user has no completion."""
    messages = _with_system(messages, system)
    if messages[-1]["role"] != "assistant":
        return {"prompt": messages, "completion": None}
    if not any(message["role"] == "user" for message in messages):
        raise DropRow("conversation without user turn")
    return {"prompt": messages[:-1], "completion": _not_blank(messages[-1]["content"], "completion")}


def _not_blank(text: str, column: str) -> str:
    if not text.strip():
        raise DropRow(f"empty {column}")
    return text


def _pair(prompt: Prompt, chosen: str, rejected: str) -> Row:
    if chosen == rejected:
        raise DropRow("chosen equals rejected")
    return {"prompt": prompt, "chosen": _not_blank(chosen, "chosen"), "rejected": _not_blank(rejected, "rejected")}


def _dialogue_pair(chosen: list[Message], rejected: list[Message], system: str | None) -> Row:
    """Two conversations that share everything but the last assistant turn."""
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise DropRow("dialogue does not end with an assistant turn")
    if chosen[:-1] != rejected[:-1]:
        raise DropRow("chosen and rejected differ before the last turn")
    if len(chosen) < 2:
        raise DropRow("dialogue without prompt")
    return _pair(_with_system(chosen[:-1], system), chosen[-1]["content"], rejected[-1]["content"])


# --- converters -------------------------------------------------------------------------------------------------------


def _text(row: Row, options: FormatOptions) -> Row:
    return {"text": _string(row, "text")}


def _rated_text(row: Row, options: FormatOptions) -> Row:
    label = {"0": 0, "1": 1, "false": 0, "true": 1}.get(str(row.get("label")).lower())
    if label is None:
        raise UserError(f"column 'label' holds {_shown(row.get('label'))}; must be 0 (negative) or 1 (positive)")
    return {"text": _string(row, "text"), "label": label}


def _prompt_completion(row: Row, options: FormatOptions) -> Row:
    completion = row.get("completion")
    if isinstance(row.get("prompt"), list):  # TRL's conversational prompt/completion
        messages = _messages(row, "prompt")
        answer = _messages(row, "completion") if isinstance(completion, list) else None
        messages += answer or [{"role": "assistant", "content": _string(row, "completion")}]
        return _answered(messages, options.system)
    return {"prompt": _prompt(_string(row, "prompt"), options), "completion": _string(row, "completion")}


def _alpaca(row: Row, options: FormatOptions) -> Row:
    instruction = _string(row, "instruction")
    extra = row.get("input")
    text = f"{instruction}\n\n{extra}" if isinstance(extra, str) and extra.strip() else instruction
    history, system = row.get("history") or [], _system(row, options)
    if not history and not system:
        return {"prompt": _prompt(text, options), "completion": _string(row, "output")}
    messages = []
    if not isinstance(history, list):
        raise UserError(f"column 'history' holds {_shown(history)}; must be a list of [question, answer]")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"column 'history' holds the turn {_shown(turn)}; must be [question, answer]")
        messages.append({"role": "user", "content": _content(turn[0], "history")})
        messages.append({"role": "assistant", "content": _content(turn[1], "history")})
    messages.append({"role": "user", "content": text})
    return {"prompt": _with_system(messages, system), "completion": _string(row, "output")}


def _openai_messages(row: Row, options: FormatOptions) -> Row:
    return _answered(_messages(row, "messages"), options.system)


def _sharegpt(row: Row, options: FormatOptions) -> Row:
    messages = _messages(row, "conversations", "from", "value")
    return _answered(messages, _system(row, options))


def _preference(row: Row, options: FormatOptions) -> Row:
    prompt = row.get("prompt")
    if isinstance(row.get("chosen"), list):
        chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
        if chosen[0]["role"] == "assistant":  # the answers alone, so the prompt column is what they answer
            is_talk = isinstance(prompt, list)
            before = _messages(row, "prompt") if is_talk else [{"role": "user", "content": _string(row, "prompt")}]
            chosen, rejected = before + chosen, before + rejected
        return _dialogue_pair(chosen, rejected, options.system)
    answers = _string(row, "chosen"), _string(row, "rejected")
    if isinstance(prompt, list):
        return _pair(_with_system(_messages(row, "prompt"), options.system), *answers)
    return _pair(_prompt(_string(row, "prompt"), options), *answers)


def _pairs(row: Row, options: FormatOptions) -> Row:
    """Two responses to one prompt without a label: what `make label-select` chooses from."""
    pair = _preference(
        {"prompt": row.get("prompt"), "chosen": row["response_a"], "rejected": row["response_b"]}, options
    )
    return {"prompt": pair["prompt"], "response_a": pair["chosen"], "response_b": pair["rejected"]}


def _sharegpt_preference(row: Row, options: FormatOptions) -> Row:
    before = _messages(row, "conversations", "from", "value")
    answers = []
    for column in ("chosen", "rejected"):
        if isinstance(row.get(column), dict):
            answers.append(_message(row[column], column, "from", "value")["content"])
        else:
            answers.append(_string(row, column))
    return _pair(_with_system(before, _system(row, options)), *answers)


def _hh(row: Row, options: FormatOptions) -> Row:
    chosen, rejected = (parse_human_assistant(_string(row, column)) for column in ("chosen", "rejected"))
    return _dialogue_pair(chosen, rejected, options.system)


def _prompts(row: Row, options: FormatOptions) -> Row:
    if isinstance(row.get("prompt"), list):
        return {"prompt": _with_system(_messages(row, "prompt"), options.system)}
    return {"prompt": _prompt(_string(row, "prompt"), options)}


def _thumbs(row: Row, options: FormatOptions) -> Row:
    """A thumb up or down for one answer. A row without completion cannot be judged."""
    label = {"0": False, "1": True, "false": False, "true": True}.get(str(row.get("label")).lower())
    if label is None:
        raise UserError(f"column 'label' holds {_shown(row.get('label'))}; must be true (good) or false (bad)")
    native = _prompt_completion(row, options)
    if native["completion"] is None:
        raise DropRow("empty completion")
    return native | {"label": label}


def _scored(row: Row, options: FormatOptions) -> Row:
    """Several answers to one prompt with a score each; answers without text or score are left out."""
    responses, scores = row.get("responses"), row.get("scores")
    if not isinstance(responses, list):
        raise UserError(f"column 'responses' holds {_shown(responses)}, not a list; check format and mapping")
    if scores is None:
        scores = [item.get(options.score) if isinstance(item, dict) else None for item in responses]
    if not isinstance(scores, list) or len(scores) != len(responses):
        raise UserError(
            f"column 'scores' holds {_shown(scores)}; must be one number for each of {len(responses)} responses"
        )
    texts = [_content(item.get("response") if isinstance(item, dict) else item, "responses") for item in responses]
    pairs = [
        (text, _score(score)) for text, score in zip(texts, scores, strict=True) if text.strip() and score is not None
    ]
    if len(pairs) < 2:
        raise DropRow("fewer than two scored responses")
    prompt = (
        _messages(row, "prompt") if isinstance(row.get("prompt"), list) else _prompt(_string(row, "prompt"), options)
    )
    return {"prompt": prompt, "responses": [text for text, _ in pairs], "scores": [score for _, score in pairs]}


def _score(value: Any) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if isinstance(value, bool) or not math.isfinite(score):
        raise UserError(f"column 'scores' holds {_shown(value)}, not a finite number")
    return score


def _turns(row: Row, options: FormatOptions) -> Row:
    """The first question; the later ones presuppose the model's own answers, so they stay in the `turns` column."""
    turns = row.get("turns")
    if not turns:
        raise DropRow("empty turns")
    if not isinstance(turns, list):
        raise UserError(f"column 'turns' holds {_shown(turns)}, not a list; check format and mapping")
    texts = [_content(turn.get("content") if isinstance(turn, dict) else turn, "turns") for turn in turns]
    return {"prompt": _prompt(_not_blank(texts[0], "turns"), options), "turns": texts}


_SFT, _PAIR = ("completion",), ("chosen", "rejected")
FORMATS: dict[str, Format] = {
    # Raw text.
    "text": Format("text", ("text",), _text, ("text",)),
    # Text with a rating of 0 or 1, such as a film review.
    "rated_text": Format("rated", ("text", "label"), _rated_text, ("text",)),
    # Two strings, or TRL's conversational form of them.
    "prompt_completion": Format("sft", ("prompt", "completion"), _prompt_completion, _SFT),
    # instruction + optional input, output; LLaMA-Factory's optional system and history.
    "alpaca": Format("sft", ("instruction", "output"), _alpaca, _SFT, ("input", "system", "history")),
    # OpenAI: [{"role", "content"}, ...].
    "messages": Format("sft", ("messages",), _openai_messages, _SFT),
    # ShareGPT: [{"from", "value"}, ...].
    "sharegpt": Format("sft", ("conversations",), _sharegpt, _SFT, ("system",)),
    # prompt, chosen, rejected: strings or messages; the prompt may be implicit where the answers are conversations.
    "preference": Format("preference", ("chosen", "rejected"), _preference, _PAIR, ("prompt",)),
    # Two responses to a prompt, not labelled: `make label-select`.
    "pairs": Format("pairs", ("prompt", "response_a", "response_b"), _pairs, ("response_a", "response_b")),
    # ShareGPT conversation, and two answers as {"from", "value"}.
    "sharegpt_preference": Format(
        "preference", ("conversations", "chosen", "rejected"), _sharegpt_preference, _PAIR, ("system",)
    ),
    # Anthropic HH: two whole dialogues as strings.
    "hh": Format("preference", ("chosen", "rejected"), _hh, _PAIR),
    # KTO: one answer with a thumb, `label` true (good) or false (bad).
    "kto": Format("thumbs", ("prompt", "completion", "label"), _thumbs, _SFT),
    # UltraFeedback: several answers with a score each: lists `responses` and `scores`, or objects with both.
    "scored": Format("scored", ("prompt", "responses"), _scored, ("responses",), ("scores",)),
    # Prompts alone: strings or messages.
    "prompts": Format("prompts", ("prompt",), _prompts, ("prompt",)),
    # MT-Bench, Arena-Hard: the user's turns, as strings or {"content"}.
    "turns": Format("prompts", ("turns",), _turns, ("prompt",)),
}


def convert_rows(format_name: str, rows: list[Row], options: FormatOptions, dropped: Counter[str]) -> list[Row]:
    """Converts mapped source rows to native rows, keeping the columns that the format does not know.

    Args:
        format_name: key of FORMATS.
        rows: source rows with the format's column names.
        options: what the converters may depend on.
        dropped: reason -> count, added to.

    Raises:
        UserError: a column holds something of the wrong type.
    """
    form = FORMATS[format_name]
    converted = []
    for row in rows:
        try:
            native = form.convert(row, options)
            _check_turn(native.get("prompt"))
        except DropRow as reason:
            dropped[str(reason)] += 1
            continue
        converted.append({k: v for k, v in row.items() if k not in form.columns} | native)
    return converted


def _check_turn(prompt: Prompt | None) -> None:
    if isinstance(prompt, list) and prompt[-1]["role"] not in ("user", "tool"):
        raise DropRow(f"prompt ends with the {prompt[-1]['role']}'s turn")


# --- from the native kind to the kind a stage asks for ----------------------------------------------------------------


def _same(rows: list[Row], options: FormatOptions, seed: int, dropped: Counter[str]) -> list[Row]:
    return rows


def _completed(rows: list[Row], options: FormatOptions, seed: int, dropped: Counter[str]) -> list[Row]:
    """sft rows with a completion; a conversation that ends with the user is good for prompts alone."""
    kept = [row for row in rows if row["completion"] is not None]
    dropped["no completion"] += len(rows) - len(kept)
    return kept


def _chosen_as_completion(rows: list[Row], options: FormatOptions, seed: int, dropped: Counter[str]) -> list[Row]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def split_opening(text: str, words: int) -> tuple[str, str] | None:
    """Cuts a text after its first `words` words (by whitespace), so that the two parts join to exactly `text`.

    Returns:
        (opening, continuation with its leading space), or None where nothing would be left to continue.
    """
    match = re.match(rf"\s*(?:\S+\s+){{{words - 1}}}\S+(?=\s)", text)
    if match is None or not text[match.end() :].strip():
        return None
    return text[: match.end()], text[match.end() :]


def _openings(rows: list[Row], options: FormatOptions, seed: int, dropped: Counter[str]) -> list[Row]:
    """Rated texts cut into prompt and completion; the other columns, the label among them, are kept."""
    cut = []
    for row in rows:
        parts = split_opening(row["text"], options.prompt_words)
        if parts is None:
            dropped["no text after the opening"] += 1
            continue
        others = {key: value for key, value in row.items() if key != "text"}
        cut.append(others | {"prompt": parts[0], "completion": parts[1]})
    return cut


def _rated_pairs(rows: list[Row], options: FormatOptions, seed: int, dropped: Counter[str]) -> list[Row]:
    """Pairs each positive continuation with `pairs_per_row` negative ones.

    The prompt is the opening of one of the two, by coin flip: each side is off-prompt half of the time, so how well a
    continuation fits its prompt says nothing about which one is preferred. Lengths are not matched.
    """
    cut = sorted(_openings(rows, options, seed, dropped), key=lambda row: order_key(row, seed))
    positives, negatives = ([row for row in cut if row["label"] == label] for label in (1, 0))
    if not negatives or not positives or options.pairs_per_row > len(negatives):
        raise UserError(
            f"pairing needs positive rows and at least pairs_per_row={options.pairs_per_row} negative ones, "
            f"but the split has {len(positives)} and {len(negatives)}; enlarge the split or lower pairs_per_row"
        )
    rng = random.Random(f"pairs {seed}")
    rng.shuffle(negatives)
    pairs = []
    for k in range(options.pairs_per_row):
        for i, positive in enumerate(positives):
            negative = negatives[(i + k) % len(negatives)]  # the shift makes a row's partners distinct
            prompt = (positive if rng.random() < 0.5 else negative)["prompt"]
            if positive["completion"] == negative["completion"]:
                dropped["chosen equals rejected"] += 1
                continue
            pairs.append({"prompt": prompt, "chosen": positive["completion"], "rejected": negative["completion"]})
    return pairs


def _liked(rows: list[Row], options: FormatOptions, seed: int, dropped: Counter[str]) -> list[Row]:
    kept = [row for row in rows if row["label"]]
    dropped["thumb down"] += len(rows) - len(kept)
    return kept


def _thumb_pairs(rows: list[Row], options: FormatOptions, seed: int, dropped: Counter[str]) -> list[Row]:
    """The good and the bad answers to one prompt, one to one in a seeded order; what finds no partner is dropped."""
    groups: dict[str, tuple[list[Row], list[Row]]] = {}
    for row in sorted(rows, key=lambda row: order_key(row, seed)):
        key = json.dumps(row["prompt"], sort_keys=True)
        groups.setdefault(key, ([], []))[0 if row["label"] else 1].append(row)
    pairs = []
    for liked, disliked in groups.values():
        dropped["thumb without a partner"] += abs(len(liked) - len(disliked))
        for up, down in zip(liked, disliked, strict=False):
            if up["completion"] == down["completion"]:
                dropped["chosen equals rejected"] += 1
                continue
            pairs.append({"prompt": up["prompt"], "chosen": up["completion"], "rejected": down["completion"]})
    return pairs


def _best(row: Row) -> int:
    """Index of the highest score, the first of equals."""
    return row["scores"].index(max(row["scores"]))


def _best_response(rows: list[Row], options: FormatOptions, seed: int, dropped: Counter[str]) -> list[Row]:
    return [{"prompt": row["prompt"], "completion": row["responses"][_best(row)]} for row in rows]


def _scored_pairs(rows: list[Row], options: FormatOptions, seed: int, dropped: Counter[str]) -> list[Row]:
    """The best answer against one of the lower-scored, drawn by the seed, as Zephyr did (Tunstall et al. 2023)."""
    pairs = []
    for row in rows:
        best = _best(row)
        chosen = row["responses"][best]
        lower = [
            text
            for text, score in zip(row["responses"], row["scores"], strict=True)
            if score < row["scores"][best] and text != chosen
        ]
        if not lower:
            dropped["all responses score alike"] += 1
            continue
        rejected = lower[int(order_key(row, seed)[:8], 16) % len(lower)]
        pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def _unlabelled(rows: list[Row], options: FormatOptions, seed: int, dropped: Counter[str]) -> list[Row]:
    """Pairs whose label is not looked at; the other columns are kept."""
    sides = {"chosen": "response_a", "rejected": "response_b"}
    return [{sides.get(column, column): value for column, value in row.items()} for row in rows]


Derivation = Callable[[list[Row], FormatOptions, int, "Counter[str]"], list[Row]]
DERIVE: dict[tuple[str, str], Derivation] = {
    ("text", "text"): _same,
    ("rated", "rated"): _same,
    ("rated", "text"): _same,
    ("rated", "sft"): _openings,
    ("rated", "prompts"): _openings,
    ("rated", "preference"): _rated_pairs,
    ("sft", "sft"): _completed,
    ("sft", "prompts"): _same,
    ("preference", "preference"): _same,
    ("preference", "sft"): _chosen_as_completion,
    ("preference", "prompts"): _same,
    ("preference", "pairs"): _unlabelled,
    ("pairs", "pairs"): _same,
    ("pairs", "prompts"): _same,
    ("prompts", "prompts"): _same,
    ("thumbs", "sft"): _liked,
    ("thumbs", "preference"): _thumb_pairs,
    ("thumbs", "prompts"): _same,
    ("scored", "sft"): _best_response,
    ("scored", "preference"): _scored_pairs,
    ("scored", "prompts"): _same,
}
# Derivations that need all rows at once; the others take them one by one.
POOLED = {("rated", "preference"), ("thumbs", "preference")}
WITH_PROMPT = ("sft", "preference", "pairs", "prompts", "thumbs", "scored")  # native kinds whose rows have a prompt


def check_derivation(native: str, kind: str) -> None:
    """Checks that rows of a native kind can give rows of `kind`.

    Raises:
        UserError: they cannot; says what they can give.
    """
    if (native, kind) not in DERIVE:
        possible = [to for start, to in DERIVE if start == native]
        label = "; `make label-select` and docs/label_efficiency.md say how to label them" if native == "pairs" else ""
        raise UserError(f"kind {kind!r} cannot be made of {native} rows; possible: {', '.join(possible)}{label}")


def detect_format(rows: list[Row]) -> tuple[str, str]:
    """Names the format of rows by their columns, and where columns do not decide, by what they hold.

    Args:
        rows: the first rows of a source.

    Returns:
        (format name, the reason in words).

    Raises:
        UserError: no format fits.
    """
    columns = {column for row in rows for column in row}
    for name, needed in _SIGNS:
        if columns.issuperset(needed) and _CONFIRM.get(name, lambda rows: True)(rows):
            _refuse_lost_answers(name, columns)
            return name, f"the rows have {' and '.join(repr(column) for column in needed)}" + _CONFIRMED.get(name, "")
    present = ", ".join(sorted(columns)) or "none"
    raise UserError(
        f"format: cannot be told from the columns ({present}); name it ({', '.join(FORMATS)}), "
        "and with `mapping` the columns that are called differently"
    )


def _refuse_lost_answers(name: str, columns: set[str]) -> None:
    """Prompts beside a column of answers: taking the prompts alone would lose the answers without a word."""
    answer = next((column for column in ("response", "answer", "output", "target") if column in columns), None)
    if name == "prompts" and answer:
        raise UserError(
            f"format: the rows have 'prompt' and {answer!r}; say `format: prompt_completion` and "
            f"`mapping: {{completion: {answer}}}` to learn from the answers, or `format: prompts` to leave them"
        )


def _all(column: str, test: Callable[[Any], bool]) -> Callable[[list[Row]], bool]:
    """A check of a column in all rows that have it."""
    return lambda rows: all(test(row[column]) for row in rows if row.get(column) is not None)


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


# Most telling columns first: a preference set may have `messages`, a rated one `text`.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("sharegpt_preference", ("conversations", "chosen", "rejected")),
    ("hh", ("chosen", "rejected")),
    ("preference", ("chosen", "rejected")),
    ("pairs", ("prompt", "response_a", "response_b")),
    ("scored", ("prompt", "responses")),
    ("kto", ("prompt", "completion", "label")),
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("alpaca", ("instruction", "output")),
    ("prompt_completion", ("prompt", "completion")),
    ("turns", ("turns",)),
    ("rated_text", ("text", "label")),
    ("text", ("text",)),
    ("prompts", ("prompt",)),
)
_CONFIRM: dict[str, Callable[[list[Row]], bool]] = {
    "hh": _all("chosen", _is_dialogue),
    "rated_text": _all("label", lambda label: str(label).lower() in ("0", "1", "true", "false")),
    "kto": _all("label", lambda label: str(label).lower() in ("0", "1", "true", "false")),
}
_CONFIRMED = {
    "hh": ", and 'chosen' holds dialogues that begin with 'Human:'",
    "rated_text": ", and 'label' is 0 or 1",
    "kto": ", and 'label' is true or false",
}


def derive_rows(
    native: str, kind: str, rows: list[Row], options: FormatOptions, seed: int, dropped: Counter[str]
) -> list[Row]:
    """Turns native rows into canonical rows of `kind`.

    Raises:
        UserError: an unknown kind, or one that rows of this native kind cannot give.
    """
    check_derivation(native, kind)
    rows = DERIVE[native, kind](rows, options, seed, dropped)
    columns = KIND_COLUMNS[kind]
    if columns is None:
        return rows
    kept = options.keep if kind == "preference" else {}
    extra = [{name: row[column] for name, column in kept.items() if column in row} for row in rows]
    return [more | {column: row[column] for column in columns} for row, more in zip(rows, extra, strict=True)]


def order_key(row: Row, seed: int) -> str:
    """A sort key that puts rows in a seeded order which depends on their content alone, not on where they stood."""
    content = json.dumps(row, ensure_ascii=True, sort_keys=True, default=str)
    return hashlib.sha256(f"order {seed} {content}".encode()).hexdigest()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
