"""The renderer: the same ids for the same conversation in every stage, and exactly one EOS."""

import os
import signal
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlhf.data import render
from rlhf.data.formats import FormatOptions, convert_rows
from rlhf.data.render import PARALLEL, Renderer
from rlhf.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "你是助手。"},
    {"role": "user", "content": "Hi, 世界!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "再见?"},
]


def build(template=None, post=None, eos="<|im_end|>"):
    """A byte-level BPE without merges: one token per byte, so expected ids can be typed in as bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<|im_end|>", "<|im_start|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator([], trainers.BpeTrainer(vocab_size=260, special_tokens=special, initial_alphabet=alphabet))
    if post:
        ids = [(token, core.token_to_id(token)) for token in special]
        core.post_processor = processors.TemplateProcessing(single=post, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token=eos, pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_plain_prompts_get_what_the_tokenizer_gives_and_responses_one_eos():
    tokenizer = build(post="<bos> $A")
    renderer = Renderer(tokenizer, chat=False)
    prompt, response = renderer.prompt_ids("a 你"), renderer.response_ids("a 你", " good .")
    assert prompt == tokenizer("a 你").input_ids
    assert text_of(tokenizer, prompt) == "<bos>a 你"
    assert text_of(tokenizer, response) == " good .<|im_end|>"
    assert len(prompt) == 1 + len("a 你".encode())
    assert len(response) == len(" good .") + 1
    assert (prompt[0], response[-1], response.count(2)) == (1, 2, 1)


def test_chat_rendering_is_exact_and_the_newline_after_eos_is_cut():
    tokenizer = build(CHATML, post="<bos> $A")
    renderer = Renderer(tokenizer, chat=True)
    prompt, response = renderer.prompt_ids(TALK), renderer.response_ids(TALK, "好的\nok")
    assert text_of(tokenizer, prompt) == (
        "<|im_start|>system\n你是助手。<|im_end|>\n<|im_start|>user\nHi, 世界!<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n再见?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(tokenizer, response) == "好的\nok<|im_end|>"
    assert response[-1] == tokenizer.eos_token_id
    full = tokenizer.apply_chat_template([*TALK, {"role": "assistant", "content": "好的\nok"}], tokenize=False)
    assert prompt + response + tokenizer("\n", add_special_tokens=False).input_ids == (
        tokenizer(full, add_special_tokens=False).input_ids
    )


def test_a_plain_prompt_in_chat_is_one_user_message():
    renderer = Renderer(build(CHATML), chat=True)
    message = [{"role": "user", "content": "问"}]
    assert renderer.prompt_ids("问") == renderer.prompt_ids(message)
    assert renderer.response_ids("问", "答") == renderer.response_ids(message, "答")


def test_same_conversation_same_ids_whatever_the_format():
    """SFT, reward and PPO read different formats of one conversation; the ids must not tell."""
    share = [
        {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], "system"), "value": m["content"]} for m in TALK
    ]
    answer, worse = "好的 ok", "no"
    last = {"role": "assistant", "content": answer}
    bad = {"role": "assistant", "content": worse}
    sources = {
        "messages": {"messages": [*TALK, last]},
        "sharegpt": {"conversations": [*share, {"from": "gpt", "value": answer}]},
        "prompt_completion": {"prompt": TALK, "completion": [last]},
        "alpaca": {
            "instruction": "再见?",
            "input": "",
            "output": answer,
            "system": "你是助手。",
            "history": [["Hi, 世界!", "Hello."]],
        },
        "preference": {"chosen": [*TALK, last], "rejected": [*TALK, bad]},
        "sharegpt_preference": {
            "conversations": share,
            "chosen": {"from": "gpt", "value": answer},
            "rejected": {"from": "gpt", "value": worse},
        },
        "hh": {
            side: f"\n\nHuman: Hi, 世界!\n\nAssistant: Hello.\n\nHuman: 再见?\n\nAssistant: {said}"
            for side, said in (("chosen", answer), ("rejected", worse))
        },
        "prompts": {"prompt": TALK},
    }
    renderer = Renderer(build(CHATML), chat=True)
    expected = (renderer.prompt_ids(TALK), renderer.response_ids(TALK, answer))
    for name, source in sources.items():
        (row,) = convert_rows(name, [source], FormatOptions(system="你是助手。"), Counter())
        assert renderer.prompt_ids(row["prompt"]) == expected[0], name
        said = row.get("completion", row.get("chosen"))
        if said is not None:
            assert renderer.response_ids(row["prompt"], said) == expected[1], name


def test_a_response_that_spells_the_eos_ends_there():
    for renderer in (Renderer(build(), chat=False), Renderer(build(CHATML), chat=True)):
        ids = renderer.response_ids("q", "a<|im_end|>b")
        assert text_of(renderer.tokenizer, ids) == "a<|im_end|>"


def test_decode_response_drops_eos_padding_and_what_follows():
    renderer = Renderer(build(), chat=False)
    ids = renderer.response_ids("q", " it 's 好 .")
    assert renderer.decode_response(ids) == " it 's 好 ."
    assert renderer.decode_response([*ids, *renderer.tokenizer("more").input_ids, 0, 0]) == " it 's 好 ."
    assert renderer.decode_response(ids[:-1]) == " it 's 好 ."


def test_prompt_text():
    renderer = Renderer(build(CHATML), chat=True)
    assert renderer.prompt_text("plain") == "plain"
    assert renderer.prompt_text([{"role": "user", "content": "only"}]) == "only"
    assert renderer.prompt_text(TALK) == "system: 你是助手。\n\nuser: Hi, 世界!\n\nassistant: Hello.\n\nuser: 再见?"


def test_messages_use_the_template_even_with_chat_off():
    tokenizer = build(CHATML)
    assert Renderer(tokenizer, chat=False).prompt_ids(TALK) == Renderer(tokenizer, chat=True).prompt_ids(TALK)


@pytest.mark.parametrize("post", ["$A <|im_end|>", "<bos> $A <|im_end|>"])
def test_a_post_processor_that_appends_is_refused(post):
    with pytest.raises(UserError, match=r"appends '<\|im_end\|>' to every text"):
        Renderer(build(post=post), chat=False)


def test_missing_template_and_missing_eos_are_refused():
    with pytest.raises(UserError, match="chat is on, but it has no chat template"):
        Renderer(build(), chat=True)
    with pytest.raises(UserError, match="conversation of 4 messages, but there is no chat template"):
        Renderer(build(), chat=False).prompt_ids(TALK)
    with pytest.raises(UserError, match="no eos_token"):
        Renderer(build(eos=None), chat=False)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>bot\n{% endif"), "must only append"),
        (CHATML.replace("<|im_end|>", ""), "holds no eos_token '<|im_end|>'"),
        ("{{ raise_exception('System role not supported') }}", "refuses the roles system, user, assistant, user"),
    ],
)
def test_unfit_templates_end_in_one_line(template, said):
    renderer = Renderer(build(template), chat=True)
    with pytest.raises(UserError) as error:
        renderer.response_ids(TALK, "x")
    assert said in str(error.value)


def test_sft_reward_and_ppo_feed_byte_equal_ids():
    """What the three stages hand to their models for one conversation; system, several turns and Chinese survive."""
    from rlhf.reward.train import rendered_pairs
    from rlhf.sft import rendered_rows

    tokenizer = build(CHATML, post="<bos> $A")
    renderer = Renderer(tokenizer, chat=True)
    answer, worse = "好的 ok 😀", "no"
    sft = rendered_rows([{"prompt": TALK, "completion": answer}], renderer, 1000, "sft")[0]
    pairs, _ = rendered_pairs([{"prompt": TALK, "chosen": answer, "rejected": worse}], renderer, 1000, "reward")
    prompt = renderer.prompt_ids(TALK)  # PPO samples behind this, and scores prompt + response
    response = renderer.response_ids(TALK, answer)
    assert list(sft["input_ids"]) == list(pairs[0]["chosen_ids"]) == prompt + response
    mask = list(sft["completion_mask"])
    assert mask == [0] * len(prompt) + [1] * len(response)
    counted = [token for token, counts in zip(sft["input_ids"], mask, strict=True) if counts]
    assert text_of(tokenizer, counted) == answer + "<|im_end|>"
    whole = text_of(tokenizer, sft["input_ids"])
    for said in ("system\n你是助手。", "user\nHi, 世界!", "assistant\nHello.", "user\n再见?"):
        assert f"<|im_start|>{said}<|im_end|>\n" in whole


# Text of any script, without what a template or a tokenizer takes for a special token.
said = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda text: text.strip() and not any(token in text for token in ("<|im_", "<pad>", "<bos>"))
)
turns = st.lists(st.tuples(said, said), max_size=3)


@settings(deadline=None, max_examples=40)
@given(st.one_of(st.none(), said), turns, said, said)
def test_any_conversation_is_rendered_alike_in_all_stages(system, earlier, question, answer):
    """One EOS, at the end; the answer comes back as it was; nothing of prompt or answer is lost."""
    from rlhf.reward.train import rendered_pairs
    from rlhf.sft import rendered_rows

    talk = [{"role": "system", "content": system}] if system else []
    for asked, replied in earlier:
        talk += [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]
    talk.append({"role": "user", "content": question})
    renderer = CHAT_RENDERER
    prompt, response = renderer.prompt_ids(talk), renderer.response_ids(talk, answer)
    eos = renderer.tokenizer.eos_token_id
    assert response[-1] == eos
    assert eos not in response[:-1]
    assert renderer.decode_response(response) == answer
    whole = text_of(renderer.tokenizer, prompt + response)
    assert whole == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk) + (
        f"<|im_start|>assistant\n{answer}<|im_end|>"
    )
    sft = rendered_rows([{"prompt": talk, "completion": answer}], renderer, 10_000, "sft")[0]
    pairs, _ = rendered_pairs([{"prompt": talk, "chosen": answer, "rejected": "x"}], renderer, 10_000, "reward")
    assert list(sft["input_ids"]) == list(pairs[0]["chosen_ids"]) == prompt + response
    assert sum(sft["completion_mask"]) == len(response)


CHAT_RENDERER = Renderer(build(CHATML), chat=True)


@pytest.mark.parametrize("setting", [None, "false"])
def test_many_at_once_are_the_ids_that_each_has_alone_and_the_cores_are_used_nowhere_else(monkeypatch, setting):
    if setting is None:
        monkeypatch.delenv(PARALLEL, raising=False)
    else:
        monkeypatch.setenv(PARALLEL, setting)
    monkeypatch.setattr(render, "TEXTS", 2)
    tokenizer = build(template=CHATML, post="<bos> $A")
    seen = []
    encode = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda *args, **kw: seen.append(os.environ.get(PARALLEL)) or encode(*args, **kw)
    )
    renderer = Renderer(tokenizer, chat=False)
    prompts, responses = ["a", TALK, "你 b", TALK[1:2], "c"], [" x", "再见", "", "y z", "<|im_end|> more"]
    seen.clear()
    some, answers = renderer.all_prompt_ids(prompts), renderer.all_response_ids(prompts, responses)
    assert set(seen) == {"true"} and os.environ.get(PARALLEL) == setting
    assert some == [renderer.prompt_ids(prompt) for prompt in prompts]
    assert answers == [renderer.response_ids(*pair) for pair in zip(prompts, responses, strict=True)]
    assert some[0][0] == tokenizer.bos_token_id != some[1][0]  # a template writes its own
    assert renderer.all_prompt_ids([]) == renderer.all_response_ids([], []) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_threads_that_it_has_not(monkeypatch):
    monkeypatch.setenv(PARALLEL, "false")
    renderer = Renderer(build(), chat=False)
    texts = [f"text {number} " * 20 for number in range(50)]
    ids = renderer.all_prompt_ids(texts)  # with threads
    child = os.fork()
    if child == 0:
        os._exit(0 if renderer.all_prompt_ids(texts) == ids else 1)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits without end")
    assert os.waitstatus_to_exitcode(status) == 0
