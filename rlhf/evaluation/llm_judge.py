"""A language model as judge of pairs, over any OpenAI-compatible URL (a service, or vLLM and llama.cpp on a machine).

Every pair is asked twice with the answers in swapped order: judges prefer the first place (Zheng et al. 2023, *Judging
LLM-as-a-Judge*). The key comes from the environment, is sent to that URL alone and is written nowhere.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rlhf.errors import UserError
from rlhf.evaluation.verdicts import read_verdict
from rlhf.recipe import LlmJudgeSection
from rlhf.redact import redact

logger = logging.getLogger(__name__)

QUESTION = """{criterion}

[Prompt]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better? Reply with one word: A, B or tie."""
_WORTH = {"a": 1.0, "b": 0.0, "tie": 0.5}  # to the answer in the first place
_LONGEST_WAIT = 60.0  # seconds between two attempts
_BODY_SHOWN = 200  # characters of an error's body
_REPLY_SHOWN = 80  # of a reply that says nothing
_MOST_UNREAD = 0.5  # with more, the win rate would be made of ties that nobody found


@dataclass(frozen=True)
class Verdicts:
    """What the judge said of N pairs.

    Attributes:
        wins: [N] share of the policy in the pair, the mean of both orders: 0, 0.25, 0.5, 0.75 or 1.
        agreement: share with the same verdict in both orders, of the pairs with a verdict in both; None without any.
        first_place: mean share of the answer that was shown first; 0.5 without position bias.
        unread: share of replies that were no verdict, which count as ties.
    """

    wins: list[float]
    agreement: float | None
    first_place: float
    unread: float


def judge_pairs(
    section: LlmJudgeSection, prompts: Sequence[str], answers: Sequence[str], baseline: Sequence[str]
) -> Verdicts:
    """Ask which of two answers is better, for each prompt in both orders.

    Args:
        section: the recipe's `evaluate.llm_judge`.
        prompts: [N] strings.
        answers: [N] of the policy asked about.
        baseline: [N] of the one it is compared with.

    Raises:
        UserError: no key, the URL cannot be reached or refuses, an answer in another form than the API's, or most
            replies say no verdict.
    """
    key = read_key(section)
    rows = list(zip(prompts, answers, baseline, strict=True))
    pairs = [(p, a, b) for p, a, b in rows] + [(p, b, a) for p, a, b in rows]
    questions = [_question(section, *pair) for pair in pairs]
    with ThreadPoolExecutor(section.concurrency) as pool:
        pending = [pool.submit(_ask, section, key, question) for question in questions]
        try:
            replies = [future.result() for future in pending]
        except UserError:
            pool.shutdown(wait=False, cancel_futures=True)  # one line, and not a thousand more requests
            raise
    return _verdicts(section, replies)


def check_reachable(section: LlmJudgeSection) -> None:
    """Ask the judge one small question: a wrong URL, model or key is said before minutes of sampling, not after.

    Raises:
        UserError: as `judge_pairs`, but for what the reply says.
    """
    _ask(section, read_key(section), _question(section, "What is 2 + 2?", "4", "5"))


def _verdicts(section: LlmJudgeSection, replies: Sequence[str]) -> Verdicts:
    """From the replies to N pairs, and to the same with the answers swapped."""
    found = [read_verdict(reply) for reply in replies]
    unread = sum(verdict is None for verdict in found)
    if unread > _MOST_UNREAD * len(found):
        example = redact(" ".join(replies[found.index(None)].split()))[:_REPLY_SHOWN]
        raise UserError(
            f"evaluate.llm_judge: {unread} of {len(found)} replies of {section.model} say neither A, B nor tie (the "
            f"first: {example!r}): raise evaluate.llm_judge.max_tokens (now {section.max_tokens}) for a model that "
            "thinks first, or take one that follows instructions"
        )
    worth = [0.5 if verdict is None else _WORTH[verdict] for verdict in found]
    count = len(found) // 2
    both = list(zip(worth[:count], [1 - value for value in worth[count:]], strict=True))
    read = [pair for pair, *said in zip(both, found[:count], found[count:], strict=True) if None not in said]
    return Verdicts(
        wins=[(forward + backward) / 2 for forward, backward in both],
        agreement=sum(forward == backward for forward, backward in read) / len(read) if read else None,
        first_place=sum(worth) / len(worth),
        unread=unread / len(found),
    )


def read_key(section: LlmJudgeSection) -> str | None:
    """The key from the environment; None where the recipe says that there is none.

    Raises:
        UserError: the variable is not set.
    """
    if section.environment_variable is None:
        return None
    key = os.environ.get(section.environment_variable)
    if not key:
        raise UserError(
            f"evaluate.llm_judge: environment variable {section.environment_variable} is not set: export it, or set "
            "evaluate.llm_judge.environment_variable to another one, or to null for a server without keys"
        )
    return key


def _question(section: LlmJudgeSection, prompt: str, first: str, second: str) -> str:
    return QUESTION.format(criterion=section.criterion, prompt=prompt, first=first, second=second)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: urllib would send the key along to another host."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _ask(section: LlmJudgeSection, key: str | None, question: str) -> str:
    """The text of one reply. Overload, timeouts and errors of the server are tried again."""
    url = section.url.rstrip("/") + "/chat/completions"
    body = {
        "model": section.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": section.max_tokens,
    }
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode("utf-8"), headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirect)
    for attempt in range(section.retries + 1):
        try:
            with opener.open(request, timeout=section.timeout) as response:
                return _content(url, response.read())
        except urllib.error.HTTPError as error:
            if (error.code not in (408, 429) and error.code < 500) or attempt == section.retries:
                raise _refused(url, section, error) from None
            wait, reason = _seconds(error.headers.get("Retry-After"), attempt), str(error.code)
        except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and resets are OSErrors
            reason = redact(str(getattr(error, "reason", error)) or type(error).__name__)
            if attempt == section.retries:
                raise UserError(
                    f"evaluate.llm_judge: no answer from {redact(url)} ({reason}): check the url, or raise "
                    "evaluate.llm_judge.timeout or retries"
                ) from None
            wait = _seconds(None, attempt)
        attempts = (attempt + 1, section.retries + 1, reason, wait)
        logger.info("llm judge: attempt %d of %d failed (%s), the next in %.0f s", *attempts)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _content(url: str, payload: bytes) -> str:
    try:
        content = json.loads(payload)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        shown = redact(" ".join(payload[:_BODY_SHOWN].decode("utf-8", "replace").split()))
        raise UserError(
            f"evaluate.llm_judge: {redact(url)} answered {shown!r}, which is no chat completion: give the base URL of "
            "an OpenAI-compatible API, such as http://localhost:8000/v1"
        ) from None
    return content if isinstance(content, str) else ""


def _refused(url: str, section: LlmJudgeSection, error: urllib.error.HTTPError) -> UserError:
    body = redact(" ".join(error.read(_BODY_SHOWN).decode("utf-8", "replace").split()))
    remedies = {401: f"check the key in {section.environment_variable}", 404: "check url and model"}
    remedies |= {403: remedies[401], 429: "lower evaluate.llm_judge.concurrency or prompts"}
    remedy = remedies.get(error.code, "check url and model, or try again later")
    return UserError(f"evaluate.llm_judge: {redact(url)} answered {error.code} {error.reason} ({body}): {remedy}")


def _seconds(asked: str | None, attempt: int) -> float:
    """How long to wait: what the server asks for, else 1, 2, 4, ... seconds."""
    return min(float(asked) if asked and asked.isdigit() else 2.0**attempt, _LONGEST_WAIT)
