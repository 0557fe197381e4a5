"""Secrets of the environment, logins in URLs and tokens of known form do not get through."""

import io
import logging

import pytest

from rlhf.redact import HIDDEN, RedactingFormatter, is_secret_name, redact, redact_tree


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plantedhub")
    monkeypatch.setenv("MY_SERVICE_API_KEY", "planted")
    monkeypatch.setenv("PGPASSWORD", "tiger42")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "tokenizers")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("login plantedhub failed", f"login {HIDDEN} failed"),  # the longer one first: no `<hidden>hub`
        ("key=planted;", f"key={HIDDEN};"),
        ("pw tiger42", f"pw {HIDDEN}"),
        ("1 of tokenizers", "1 of tokenizers"),
        ("http://user:p@ss@proxy:3128/x?a=b@c", f"http://{HIDDEN}@proxy:3128/x?a=b@c"),
        ("https://abcdef@host/file.jsonl", f"https://{HIDDEN}@host/file.jsonl"),
        ("mail me@host about https://host/a", "mail me@host about https://host/a"),
        ("hf_abcdefghijklmnopqrstuvwxyz012345 bad", f"{HIDDEN} bad"),
        ("sk-proj-abcdefghijklmnop1234", HIDDEN),
        ("AKIAIOSFODNN7EXAMPLE1", HIDDEN),
        ("task-name", "task-name"),
    ],
)
def test_text(text, expected):
    assert redact(text) == expected


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "hub_token",
     "DB_PASSWORD", "CLIENT_SECRET", "GOOGLE_CREDENTIALS", "PGPASSWORD", "PASSWORD"],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["eos_token", "pad_token", "num_tokens", "max_tokens_per_micro_batch", "TOKENIZERS_PARALLELISM"]
)
def test_names_of_settings(name):
    assert not is_secret_name(name)


def test_tree():
    tree = {"trainer": {"hub_token": "anything", "max_steps": 3, "note": ["planted", True]}, "eos_token": "</s>"}
    assert redact_tree(tree) == {
        "trainer": {"hub_token": HIDDEN, "max_steps": 3, "note": [HIDDEN, True]},
        "eos_token": "</s>",
    }


def test_log_lines_and_their_tracebacks():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise ValueError("plantedhub is no token")
    except ValueError:
        logger.exception("cannot log in with %s", "plantedhub")
    assert "plantedhub" not in stream.getvalue() and stream.getvalue().count(HIDDEN) == 3  # message, source line, error
