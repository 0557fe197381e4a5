"""The LLM judge against a local HTTP server that answers as the API does, well and badly."""

import json
import logging
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf.errors import UserError
from rlhf.evaluation import llm_judge
from rlhf.evaluation.llm_judge import judge_pairs
from rlhf.evaluation.stage import STAGE
from rlhf.recipe import LlmJudgeSection, Recipe
from rlhf.stage import run_stage
from tests.builders import build_model, build_reward_artifact, build_sft_artifact, build_tokenizer, toy_recipe
from tests.ppo_toys import lively

KEY = "plainly-secret-key-of-the-test"
ANSWERS = re.compile(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\nWhich", re.DOTALL)


@pytest.fixture
def server(monkeypatch):
    """A server with `reply(first, second) -> (status, headers, text)`; `server.seen` holds requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            http.seen.append((self.path, dict(self.headers), body))
            status, headers, text = http.reply(*ANSWERS.search(body["messages"][0]["content"]).groups())
            payload = text.encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(payload)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.seen, http.url = [], f"http://127.0.0.1:{http.server_port}/v1"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(llm_judge.time, "sleep", lambda seconds: None)
    yield http
    http.shutdown()
    http.server_close()


def says(text):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]})


def section(server, **changes):
    return LlmJudgeSection(url=server.url, model="judge-1", **changes)


def test_the_better_answer_wins_in_either_place(server):
    server.reply = lambda first, second: says("A" if len(first) > len(second) else "B" if first != second else "Tie.")
    verdicts = judge_pairs(section(server), ["p", "q", "r"], ["long one", "x", "same"], ["short", "longer", "same"])
    assert verdicts.wins == [1.0, 0.0, 0.5]
    assert (verdicts.agreement, verdicts.first_place, verdicts.unread) == (1.0, 0.5, 0.0)
    path, headers, body = server.seen[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (body["model"], body["temperature"], len(server.seen)) == ("judge-1", 0, 6)


def test_a_judge_that_always_likes_the_first_gives_ties(server):
    server.reply = lambda first, second: says("Answer A")
    verdicts = judge_pairs(section(server), ["p", "q"], ["a", "b"], ["c", "d"])
    assert verdicts.wins == [0.5, 0.5]
    assert (verdicts.agreement, verdicts.first_place) == (0.0, 1.0)


def test_what_is_no_verdict_counts_as_a_tie(server):
    server.reply = lambda first, second: says("Both are about films" if first == "a" else "**B**")
    verdicts = judge_pairs(section(server), ["p"], ["a"], ["c"])
    assert verdicts.wins == [0.75] and verdicts.unread == 0.5  # B is the policy's place in the second order
    assert verdicts.agreement is None  # no pair has two verdicts that could agree


def test_agreement_is_that_of_the_pairs_with_two_verdicts(server):
    def reply(first, second):
        return says("no idea" if "dull" in (first, second) else "A" if len(first) > len(second) else "B")

    server.reply = reply
    verdicts = judge_pairs(section(server), ["p", "q", "r"], ["long one", "x", "dull"], ["short", "longer", "c"])
    assert verdicts.wins == [1.0, 0.0, 0.5]
    assert (verdicts.agreement, verdicts.unread) == (1.0, 2 / 6)
    server.reply = lambda first, second: says("no idea" if "dull" in (first, second) else "A")
    verdicts = judge_pairs(section(server), ["p", "q", "r"], ["long one", "x", "dull"], ["short", "longer", "c"])
    assert verdicts.agreement == 0.0  # the pair without a verdict agrees with nothing


def test_a_model_that_thinks_is_read_behind_its_thoughts(server):
    def reply(first, second):
        said, other = ("B", "A") if len(second) > len(first) else ("A", "B")
        return says(f"<think>\nThe better answer is {other}? No.\n</think>\n\nThe better answer is {said}.")

    server.reply = reply
    verdicts = judge_pairs(section(server), ["p", "q"], ["long one", "x"], ["short", "longer"])
    assert (verdicts.wins, verdicts.agreement, verdicts.unread) == ([1.0, 0.0], 1.0, 0.0)


def test_thoughts_that_are_cut_off_are_no_evaluation(server):
    server.reply = lambda first, second: says("<think>\nOkay, the user wants me to")
    seen = (
        r"4 of 4 replies of judge-1 say neither A, B nor tie \(the first: '<think> Okay.*raise .*max_tokens \(now 8\)"
    )
    with pytest.raises(UserError, match=seen) as error:
        judge_pairs(section(server), ["p", "q"], ["a", "b"], ["c", "d"])
    assert "\n" not in str(error.value)


def test_overload_is_tried_again(server):
    def reply(first, second):
        return (429, {"Retry-After": "1"}, "slow down") if len(server.seen) < 3 else says("A")

    server.reply = reply
    assert judge_pairs(section(server, concurrency=1), ["p"], ["a"], ["b"]).wins == [0.5]
    assert len(server.seen) == 4


@pytest.mark.parametrize(
    ("reply", "seen"),
    [
        ((401, {}, f"bad key {KEY}"), r"answered 401 .*\(bad key <hidden>\): check the key in OPENAI_API_KEY"),
        ((404, {}, "no such model"), r"answered 404 .*no such model.*check url and model"),
        ((500, {}, "broken"), r"answered 500 .*try again later"),
        ((302, {"Location": "http://127.0.0.1:9/elsewhere"}, ""), r"answered 302"),
        ((200, {}, "<html>hello</html>"), r"answered '<html>hello</html>', which is no chat completion"),
        ((200, {}, '{"choices": []}'), r"which is no chat completion"),
    ],
)
def test_errors_are_one_line_without_the_key(server, reply, seen, caplog):
    server.reply = lambda first, second: reply
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError, match=seen) as error:
        judge_pairs(section(server, retries=1), ["p"], ["a"], ["b"])
    assert "\n" not in str(error.value)
    assert KEY not in str(error.value) + caplog.text
    assert error.value.__cause__ is None


def test_nobody_there(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"no answer from http://127.0.0.1:\d+/v1/chat/completions .*check the url"):
        judge_pairs(section(server, retries=0), ["p"], ["a"], ["b"])


def test_no_key_is_said_before_anything_is_asked(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        judge_pairs(section(server), ["p"], ["a"], ["b"])
    server.reply = lambda first, second: says("tie")
    assert judge_pairs(section(server, environment_variable=None), ["p"], ["a"], ["b"]).wins == [0.5]
    assert "Authorization" not in server.seen[0][1]


def test_its_win_rate_is_in_the_report(server, tmp_path):
    tokenizer = build_tokenizer()
    build_sft_artifact(tmp_path, tokenizer=tokenizer, model=lively(build_model(tokenizer)))
    build_reward_artifact(tmp_path)
    evaluate = {
        "policies": [{"artifact": "sft"}, {"artifact": "sft", "best_of": 2}],
        "best_of_n": 1,
        "llm_judge": {"url": server.url, "model": "judge-1", "prompts": 3},
    }
    server.reply = lambda first, second: says("A")
    recipe = Recipe.model_validate(toy_recipe(tmp_path, evaluate=evaluate))
    artifact = run_stage(STAGE, recipe, tmp_path, "toy")
    metrics = artifact.manifest["metrics"]
    assert metrics["sft_best_of_2_vs_sft/win_rate_llm"] == 0.5
    assert metrics["sft_best_of_2_vs_sft/order_agreement_llm"] == 0.0
    assert metrics["sft_best_of_2_vs_sft/unread_llm"] == 0.0
    text = (artifact.path / "report.md").read_text(encoding="utf-8")
    assert "win rate over SFT by llm" in text
    assert "| same verdict in both orders, llm " in text and "| replies without a verdict, llm " in text
    assert len(server.seen) == 1 + 6  # the first asks whether anybody is there
    assert not [path for path in artifact.path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_judge_that_refuses_is_said_before_anything_is_sampled(server, tmp_path, monkeypatch):
    tokenizer = build_tokenizer()
    build_sft_artifact(tmp_path, tokenizer=tokenizer, model=lively(build_model(tokenizer)))
    build_reward_artifact(tmp_path)
    evaluate = {"policies": [{"artifact": "sft"}, {"artifact": "sft", "best_of": 2}]}
    evaluate["llm_judge"] = {"url": server.url, "model": "judge-1", "retries": 0}
    server.reply = lambda first, second: (404, {}, "no such model")
    monkeypatch.setattr("rlhf.evaluation.stage.evaluate_policy", lambda *args: pytest.fail("sampled"))
    recipe = Recipe.model_validate(toy_recipe(tmp_path, evaluate=evaluate))
    with pytest.raises(UserError, match=r"answered 404 .*no such model.*check url and model"):
        run_stage(STAGE, recipe, tmp_path, "toy")
