"""Formats: every expected row is typed in."""

from collections import Counter

import pytest

from rlhf.data.filters import collapse_spaces, count_words, failed_filter, normalize, strip_html
from rlhf.data.formats import FormatOptions, convert_rows, derive_rows, split_opening
from rlhf.errors import UserError

USER, BOT = "user", "assistant"


def convert(name, *rows, **options):
    dropped = Counter()
    return convert_rows(name, list(rows), FormatOptions(**options), dropped), +dropped


def message(role, content):
    return {"role": role, "content": content}


def test_text_and_rated_text():
    assert convert("text", {"text": "中文 a"}, {"text": " "}, {"text": None}) == (
        [{"text": "中文 a"}],
        {"empty text": 2},
    )
    rows, _ = convert(
        "rated_text", {"text": "a", "label": "1"}, {"text": "b", "label": 0}, {"text": "c", "label": True}
    )
    assert [row["label"] for row in rows] == [1, 0, 1]
    with pytest.raises(UserError, match="'label' holds 'pos'; must be 0"):
        convert("rated_text", {"text": "a", "label": "pos"})


def test_prompt_completion_plain_and_conversational():
    rows, dropped = convert(
        "prompt_completion",
        {"prompt": "2+2=", "completion": 4, "topic": "sums"},
        {"prompt": [message("user", "你好")], "completion": [message("assistant", "您好！")]},
        {"prompt": "x", "completion": ""},
    )
    assert rows == [
        {"prompt": "2+2=", "completion": "4", "topic": "sums"},
        {"prompt": [message(USER, "你好")], "completion": "您好！"},
    ]
    assert dropped == {"empty completion": 1}


def test_alpaca_with_input_history_and_system():
    rows, _ = convert(
        "alpaca",
        {"instruction": "翻译", "input": "cat", "output": "猫"},
        {"instruction": "Go on.", "input": "", "output": "Yes.", "history": [["Hi", "Hello"]], "system": "Be kind."},
    )
    assert rows == [
        {"prompt": "翻译\n\ncat", "completion": "猫"},
        {
            "prompt": [
                message("system", "Be kind."),
                message(USER, "Hi"),
                message(BOT, "Hello"),
                message(USER, "Go on."),
            ],
            "completion": "Yes.",
        },
    ]


def test_messages_keep_system_and_turns_and_train_on_the_last_answer():
    talk = [message("system", "s"), message(USER, "1"), message(BOT, "2"), message(USER, "3"), message(BOT, "4")]
    parts = [message("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), message("assistant", "c")]
    rows, dropped = convert(
        "messages",
        {"messages": talk},
        {"messages": talk[:4]},
        {"messages": parts},
        {"messages": []},
        {"messages": [message(USER, "a"), message(BOT, "b"), message(BOT, "c")]},
    )
    assert rows == [
        {"prompt": talk[:4], "completion": "4"},
        {"prompt": talk[:4], "completion": None},
        {"prompt": [message(USER, "ab")], "completion": "c"},
    ]
    assert dropped == {"empty messages": 1, "prompt ends with the assistant's turn": 1}
    assert derive_rows("sft", "sft", rows, FormatOptions(), 0, Counter()) == [rows[0], rows[2]]
    assert [row["prompt"] for row in derive_rows("sft", "prompts", rows, FormatOptions(), 0, Counter())] == [
        talk[:4],
        talk[:4],
        [message(USER, "ab")],
    ]


def test_sharegpt_roles_and_recipe_system():
    row = {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}
    assert convert("sharegpt", row, system="你是助手")[0] == [
        {"prompt": [message("system", "你是助手"), message(USER, "问")], "completion": "答"}
    ]
    own = {"conversations": [{"from": "system", "value": "own"}, *row["conversations"]]}
    assert convert("sharegpt", own, system="recipe's")[0][0]["prompt"][0] == message("system", "own")
    with pytest.raises(UserError, match="has the role 'alien'"):
        convert("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]})
    with pytest.raises(UserError, match="needs from and value"):
        convert("sharegpt", {"conversations": [message("user", "x")]})


def test_preference_in_its_four_shapes():
    ask, good, bad = message(USER, "q"), message(BOT, "good"), message(BOT, "bad")
    rows, dropped = convert(
        "preference",
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [ask, good], "rejected": [ask, bad]},
        {"chosen": [ask, good], "rejected": [ask, bad]},
        {"prompt": [ask], "chosen": [good], "rejected": [bad]},
        {"prompt": "q", "chosen": [good], "rejected": [bad]},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": "a", "rejected": None},
        {"chosen": [ask, good], "rejected": [message(USER, "other"), bad]},
    )
    pair = {"chosen": "good", "rejected": "bad"}
    assert rows == [{"prompt": "q"} | pair] + [{"prompt": [ask]} | pair] * 4
    assert dropped == {
        "chosen equals rejected": 1,
        "empty rejected": 1,
        "chosen and rejected differ before the last turn": 1,
    }


def test_preference_with_human_assistant_prompts():
    rows, dropped = convert(
        "preference",
        {"prompt": "Human: a: b\n\nAssistant: c\n\n\nHuman: d", "chosen": "x", "rejected": "y"},
        {"prompt": "d", "chosen": "x", "rejected": "y"},
        {"prompt": "Human: a\n\nAssistant: c", "chosen": "x", "rejected": "y"},
        prompt_style="human_assistant",
        system="s",
    )
    prompt = [message("system", "s"), message(USER, "a: b"), message(BOT, "c"), message(USER, "d")]
    assert rows == [{"prompt": prompt, "chosen": "x", "rejected": "y"}]
    assert dropped == {"dialogue does not start with 'Human:'": 1, "prompt does not end with a human turn": 1}


def test_sharegpt_preference():
    rows, _ = convert(
        "sharegpt_preference",
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "问"}],
            "chosen": {"from": "gpt", "value": "好"},
            "rejected": {"from": "gpt", "value": "坏"},
        },
    )
    assert rows == [{"prompt": [message("system", "s"), message(USER, "问")], "chosen": "好", "rejected": "坏"}]


def test_hh_dialogues():
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: one\n\nHuman: two\n\nAssistant:"
    rows, dropped = convert(
        "hh",
        {"chosen": start + " Good: \n\nyes.", "rejected": start + " Bad."},
        {"chosen": start + " x", "rejected": start.replace("Hello", "Hey") + " y"},
        {"chosen": start, "rejected": start + " y"},
        {"chosen": "\n\nHuman: a", "rejected": start + " y"},
        {"chosen": "\n\nAssistant: a", "rejected": start + " y"},
    )
    assert rows == [
        {
            "prompt": [message(USER, "Hi"), message(BOT, "Hello."), message(USER, "one\n\ntwo")],
            "chosen": "Good: \n\nyes.",
            "rejected": "Bad.",
        }
    ]
    assert dropped == {
        "chosen and rejected differ before the last turn": 1,
        "empty chosen": 1,
        "dialogue does not end with an assistant turn": 1,
        "dialogue does not start with 'Human:'": 1,
    }


def test_prompts_and_turns_keep_other_columns():
    rows, _ = convert("prompts", {"prompt": "问", "answer": "42"})
    assert derive_rows("prompts", "prompts", rows, FormatOptions(), 0, Counter()) == [{"prompt": "问", "answer": "42"}]
    rows, dropped = convert("turns", {"turns": ["a", "b"], "id": 1}, {"turns": [{"content": "c"}]}, {"turns": []})
    assert rows == [{"prompt": "a", "turns": ["a", "b"], "id": 1}, {"prompt": "c", "turns": ["c"]}]
    assert dropped == {"empty turns": 1}


def test_prompt_template_and_system_wrap_plain_prompts():
    row = {"prompt": "q {x}", "completion": "a"}
    assert convert("prompt_completion", row, prompt_template="Q: {prompt}\nA:")[0][0]["prompt"] == "Q: q {x}\nA:"
    assert convert("prompt_completion", row, system="s")[0][0]["prompt"] == [
        message("system", "s"),
        message(USER, "q {x}"),
    ]


def test_wrong_types_name_column_and_value():
    with pytest.raises(UserError, match=r"column 'text' holds \['a'\], not text"):
        convert("text", {"text": ["a"]})
    with pytest.raises(UserError, match="column 'messages' holds 'hi', not a list"):
        convert("messages", {"messages": "hi"})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a b c d", ("a b", " c d")),
        ("  a \n b  c", ("  a \n b", "  c")),
        ("a b", None),
        ("a b  ", None),
        ("a", None),
    ],
)
def test_split_opening(text, parts):
    assert split_opening(text, 2) == parts


def test_rated_text_becomes_sft_rows_that_join_to_the_text():
    rows = [{"text": "one two  three", "label": 1, "source": "s"}, {"text": "one two", "label": 0}]
    dropped = Counter()
    options = FormatOptions(prompt_words=2)
    assert derive_rows("rated", "sft", rows, options, 0, dropped) == [{"prompt": "one two", "completion": "  three"}]
    assert dropped == {"no text after the opening": 1}
    assert derive_rows("rated", "prompts", rows, options, 0, Counter()) == [
        {"prompt": "one two", "completion": "  three", "label": 1, "source": "s"}
    ]


def rated(positives, negatives):
    rows = [{"text": f"p{i} good{i}", "label": 1} for i in range(positives)]
    return rows + [{"text": f"n{i} bad{i}", "label": 0} for i in range(negatives)]


def pairs_of(rows, seed=0, per_row=1):
    options = FormatOptions(prompt_words=1, pairs_per_row=per_row)
    return derive_rows("rated", "preference", rows, options, seed, Counter())


def test_rated_pairs():
    rows = rated(40, 30)
    pairs = pairs_of(rows, per_row=3)
    assert len(pairs) == 120
    assert Counter(pair["chosen"] for pair in pairs) == {f" good{i}": 3 for i in range(40)}
    assert {pair["rejected"] for pair in pairs} <= {f" bad{i}" for i in range(30)}
    assert len({(pair["chosen"], pair["rejected"]) for pair in pairs}) == 120
    own = [pair["prompt"] == pair["chosen"].replace(" good", "p") for pair in pairs]
    others = [pair["prompt"] == pair["rejected"].replace(" bad", "n") for pair in pairs]
    assert all(a != b for a, b in zip(own, others, strict=True))
    assert 40 <= sum(own) <= 80  # 60 expected, standard deviation 5.5


def test_rated_pairs_depend_on_seed_not_on_row_order():
    rows = rated(20, 20)
    assert pairs_of(rows) == pairs_of(rows[::-1])
    assert pairs_of(rows) != pairs_of(rows, seed=1)


def test_rated_pairs_need_both_labels():
    with pytest.raises(UserError, match=r"pairs_per_row=3 negative ones, but the split has 5 and 2"):
        pairs_of(rated(5, 2), per_row=3)
    with pytest.raises(UserError, match="the split has 0 and 2"):
        pairs_of(rated(0, 2))


def test_preference_rows_give_sft_and_prompts_and_nothing_else():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "cat": "x"}
    assert derive_rows("preference", "sft", [row], FormatOptions(), 0, Counter()) == [
        {"prompt": "q", "completion": "a"}
    ]
    assert derive_rows("preference", "prompts", [row], FormatOptions(), 0, Counter()) == [row]
    with pytest.raises(
        UserError, match="kind 'text' cannot be made of preference rows; possible: preference, sft, prompts"
    ):
        derive_rows("preference", "text", [row], FormatOptions(), 0, Counter())


def test_word_counts_and_filters():
    assert count_words("it's a film .") == 4
    assert count_words("我爱 NLP 模型") == 5
    assert failed_filter(["a b c"], [{"min_words": 3}, {"max_words": 3}]) is None
    assert failed_filter(["a b c", "a"], [{"min_words": 2}]) == "min_words"
    assert failed_filter(["a b c"], [{"max_words": 2}]) == "max_words"
    assert failed_filter(["abc"], [{"max_chars": 3}, {"min_chars": 4}]) == "min_chars"
    assert failed_filter(["abc"], [{"contains": "b."}, {"excludes": "^a"}]) == "excludes"


def test_normalisation():
    assert strip_html("a<br /><BR>b <i>c</i> &amp; 1 <3") == "a\n\nb c & 1 <3"
    assert collapse_spaces("  a \t b\n c ") == "a b\n c"
    nested = [{"role": "user", "content": "a<br>b"}]
    assert normalize(nested, ["strip_html"]) == [{"role": "user", "content": "a\nb"}]
