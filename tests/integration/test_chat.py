"""The chat with a finished run: scores are the run's own, commands do what they say."""

import io

import pytest

from pipelines import chat as command
from rlhf.data import Renderer
from rlhf.errors import UserError
from rlhf.evaluation.chat import Chat, chat_context
from rlhf.models import load_model, load_tokenizer
from rlhf.sampling import score_sequences
from tests.tolerances import assert_close


@pytest.fixture(scope="module")
def chat(ci_run):
    return Chat(chat_context(ci_run.parent, ci_run.name, "ppo", ["evaluate.judges=[]"]))


@pytest.fixture(autouse=True)
def new(chat):
    chat.forget()


def test_both_policies_answer_and_the_reward_is_that_of_the_reward_model(chat, ci_run):
    answers = chat.ask("this film is")
    assert [answer.policy for answer in answers] == ["sft", "ppo"]
    assert answers[0].kl == 0 != answers[1].kl
    artifact = chat.sampler.ctx.inputs["reward"]
    statistics, tokenizer = artifact.manifest["reward_statistics"], load_tokenizer(artifact.model_dir)
    ids = Renderer(tokenizer, False).prompt_ids("this film is")
    for answer in answers:
        response = tokenizer(answer.text, add_special_tokens=False).input_ids
        if answer.ended and len(response) + 1 == answer.tokens:  # the text gives the same tokens again
            raw = score_sequences(
                load_model(artifact.model_dir, "score"), [[*ids, *response, tokenizer.eos_token_id]], 0
            )[0]
            assert_close(answer.scores["reward"], (raw - statistics["mean"]) / statistics["std"], rtol=1e-3, atol=1e-3)


def test_asking_twice_gives_the_same_and_again_gives_another(chat):
    first, other = chat.ask("this film is"), chat.again()
    assert [answer.text for answer in other] != [answer.text for answer in first]
    chat.forget()
    assert chat.ask("this film is") == first
    assert chat.again() == other


def test_conversations_are_remembered_apart_and_again_replaces_the_last_turn(chat, monkeypatch):
    chat.ask("one")
    chat.ask("two")
    chat.again()
    for history in chat.histories.values():
        assert [turn["role"] for turn in history] == ["user", "assistant", "user", "assistant"]
        assert [turn["content"] for turn in history[::2]] == ["one", "two"]
    monkeypatch.setattr(chat.sampler.renderer, "chat", True)
    monkeypatch.setattr(chat.sampler.renderer, "prompt_ids", lambda prompt: [0] * len(prompt))
    prompts = chat._prompts("three")
    assert [turn["content"] for turn in prompts["sft"]][::2] == ["one", "two", "three"]
    assert prompts["sft"][1]["content"] == chat.histories["sft"][1]["content"]


def test_what_is_too_long_is_refused_in_one_line_and_changes_nothing(chat):
    chat.ask("one")
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens for sft, ppo.max_prompt_length is \d+: say less"):
        chat.ask("very " * 200)
    assert chat.last == ("one", 0) and len(chat.histories["sft"]) == 2


def test_lines_and_commands(chat):
    assert command.respond(chat, "\n") == "" and command.respond(chat, "/quit") is None
    assert "type a prompt first" in command.respond(chat, "/again")
    assert command.respond(chat, "/help") == "no command /help: /again, /new, /quit"
    said = command.respond(chat, "the film\n")
    assert said.startswith("sft  [reward ") and "\nppo  [reward " in said and "KL 0.0" in said
    assert command.respond(chat, "/new") == "a new conversation" and chat.last is None


def test_the_command_reads_a_pipe(ci_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("the film\n/quit\nnever read\n"))
    run = ["--run", ci_run.name, "--artifacts", str(ci_run.parent), "evaluate.judges=[]"]
    assert command.main([*run, "--stage", "sft"]) == 0
    said = capsys.readouterr().out
    assert said.count("sft  [") == 1 and "ppo  [" not in said
    raw = b"/again\nx\xff bad\n" + b"film " * 2000 + b"\nthe film\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
    assert command.main([*run, "--stage", "sft"]) == 2  # one was too long, and the others are answered
    said = capsys.readouterr().out
    assert said.count("error: ") == 2 and said.count("sft  [") == 2
    assert command.main([*run, "--stage", "ppo2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: chat: no finished stage") and "ppo2" in error and error.count("\n") == 1
