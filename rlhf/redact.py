"""Secrets stay out of what is written or shown: manifests, cards, logs, error lines. Imports no torch."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

HIDDEN = "<hidden>"
# Names of environment variables and recipe keys whose values are secret: HF_TOKEN, WANDB_API_KEY, hub_token, ...
_SECRET_NAME = re.compile(r"(token|key|secret|credentials?)(_|$)|password|passwd", re.IGNORECASE)
_NO_SECRET = re.compile(r"(eos|bos|pad)_token", re.IGNORECASE)  # settings of ours and of TRL
_LOGIN = re.compile(r"(?<=://)[^\s/'\"]+(?=@)")  # https://user:password@host
_KNOWN = re.compile(r"\b(?:hf_|sk-|ghp_|AKIA)[A-Za-z0-9_-]{16,}")  # Hugging Face, OpenAI, GitHub, AWS
_SHORTEST = 6  # characters; `true` or `1` is no secret, and hiding it everywhere would garble the text


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name holds a secret."""
    return bool(_SECRET_NAME.search(name)) and not _NO_SECRET.search(name)


def secrets() -> list[str]:
    """Secret values of the environment, longest first, so that no part of a longer one is left."""
    values = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= _SHORTEST}
    return sorted(values, key=len, reverse=True)


def redact(text: str) -> str:
    """`text` without the environment's secrets, without logins in URLs, and without tokens of known form."""
    for secret in secrets():
        text = text.replace(secret, HIDDEN)
    return _KNOWN.sub(HIDDEN, _LOGIN.sub(HIDDEN, text))


def redact_tree(value: Any, name: str = "") -> Any:
    """The same for every text in JSON-like data; what stands under a secret name (`hub_token`) is hidden whole."""
    if isinstance(value, dict):
        return {key: redact_tree(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(item, name) for item in value]
    if isinstance(value, str):
        return HIDDEN if value and is_secret_name(name) else redact(value)
    return value


class RedactingFormatter(logging.Formatter):
    """A formatter whose lines, tracebacks included, hold no secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return redact(super().format(record))
