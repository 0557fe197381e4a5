"""User-supplied functions: loading and calling."""

import functools
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rlhf.errors import UserError
from rlhf.functions import call_text_function, function_name, load_function


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working directory of the user's own, with modules that no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_loads_from_the_working_directory(workdir):
    (workdir / "user_rewards_a.py").write_text("class Box:\n    def f(prompts, responses):\n        return [1.0]\n")
    assert load_function("user_rewards_a:Box.f")(["p"], ["r"]) == [1.0]


def test_loads_from_a_package_and_never_shadows_the_standard_library(workdir):
    (workdir / "user_pkg_b").mkdir()
    (workdir / "user_pkg_b" / "rewards.py").write_text("def f(prompts, responses):\n    return [2.0]\n")
    (workdir / "math.py").write_text("raise RuntimeError('shadowed')\n")
    assert load_function("user_pkg_b.rewards:f")([], []) == [2.0]
    assert load_function("math:sqrt")(4) == 2.0
    assert sys.path[-1] == str(workdir)


@pytest.mark.parametrize(
    ("spec", "seen"),
    [
        ("user_c.f", "not of the form package.module:callable"),
        ("user_c:", "not of the form"),
        (":f", "not of the form"),
        ("user_c:f()", "not of the form"),
        ("no_such_module_c:f", "no module 'no_such_module_c'"),
        ("user_c.sub:f", "no module 'user_c.sub'|no module 'user_c'"),
        ("user_c:g", "user_c has no attribute 'g'"),
        ("user_c:N", "it is a int, not callable"),
        ("user_d:f", "user_d imports 'not_installed_xyz'"),
    ],
)
def test_bad_spec_is_one_line(workdir, spec, seen):
    (workdir / "user_c.py").write_text("N = 3\ndef f(prompts, responses): ...\n")
    (workdir / "user_d.py").write_text("import not_installed_xyz\n")
    with pytest.raises(UserError, match=seen) as error:
        load_function(spec)
    assert "\n" not in str(error.value)


def test_error_inside_the_module_keeps_its_traceback(workdir):
    (workdir / "user_e.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_function("user_e:f")


PROMPTS, RESPONSES, COLUMNS = ["p", "pp"], ["rrr", "r"], {"label": [10, 20], "source": ["x", "y"]}
TWO = PROMPTS, RESPONSES


def names_both(responses, prompts):
    return [len(response) - len(prompt) for prompt, response in zip(prompts, responses, strict=True)]


def keyword_only(*, prompts, responses, label):
    return label


def other_names(texts, answers, source):
    rows = zip(texts, answers, source, strict=True)
    return [len(text) + 0.5 * len(answer) + (entry == "y") for text, answer, entry in rows]


def everything(prompts, responses, **columns):
    return [float(len(columns))] * len(prompts)


def label_is_the_first(label, answers):
    return [len(text) for text in label]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (names_both, [2.0, -1.0]),  # by name: swapped parameters get the right lists
        (keyword_only, [10.0, 20.0]),
        (other_names, [2.5, 3.5]),
        (everything, [2.0, 2.0]),
        (label_is_the_first, [1.0, 2.0]),  # a column never takes the place of the prompts
        (functools.partial(other_names, source=["y", "y"]), [2.5, 3.5]),
        (lambda prompts, responses: np.array([1, 2]), [1.0, 2.0]),
        (lambda prompts, responses: (True, np.float32(0.5)), [1.0, 0.5]),
    ],
)
def test_call(function, expected):
    values = call_text_function(function, PROMPTS, RESPONSES, COLUMNS)
    assert values == expected
    assert all(type(value) is float for value in values)


def test_function_may_change_its_lists():
    prompts = ["a", "b"]
    call_text_function(lambda prompts, responses: [prompts.clear() or 0.0, 1.0], prompts, ["c", "d"])
    assert prompts == ["a", "b"]


@pytest.mark.parametrize(
    ("returned", "seen"),
    [
        ([1.0], "returned 1 values for 2 prompts"),
        (None, "returned a NoneType"),
        ("ab", "returned a str"),
        ({"a": 1, "b": 2}, "returned a dict"),
        ([1.0, float("nan")], "value 1 is nan"),
        ([float("inf"), 1.0], "value 0 is inf"),
        (["1.0", 2.0], "value 0 is '1.0'"),
        ([0.0, None], "value 1 is None"),
        ([0.0, [1.0]], r"value 1 is \[1.0\]"),
    ],
)
def test_bad_return_names_function_index_and_value(returned, seen):
    def my_reward(prompts, responses):
        return returned

    with pytest.raises(UserError, match=seen) as error:
        call_text_function(my_reward, PROMPTS, RESPONSES)
    assert "my_reward" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_column_and_wrong_length_are_user_errors():
    def needs(prompts, responses, answer):
        return [0.0] * len(prompts)

    with pytest.raises(UserError, match=r"'answer'.*available: label, source"):
        call_text_function(needs, PROMPTS, RESPONSES, COLUMNS)
    with pytest.raises(UserError, match="1 responses for 2 prompts"):
        call_text_function(everything, PROMPTS, ["r"])
    with pytest.raises(UserError, match="3 label for 2 prompts"):
        call_text_function(everything, PROMPTS, RESPONSES, {"label": [1, 2, 3]})


def test_an_error_in_the_function_is_one_line_with_the_prompt_that_caused_it():
    prompts = [f"prompt {i} " + "x" * 100 for i in range(7)]
    calls = []

    def broken(prompts, responses, label):
        calls.append(len(prompts))
        return [len(3) if "prompt 5" in prompt else value for prompt, value in zip(prompts, label, strict=True)]

    with pytest.raises(UserError) as error:
        call_text_function(broken, prompts, prompts, {"label": list(range(7))})
    assert isinstance(error.value.__cause__, TypeError)  # the traceback is there for who wants it
    line = str(error.value)
    assert "broken: raised TypeError: object of type 'int' has no len() (test_evaluation_functions.py line " in line
    assert "prompt 'prompt 5 xxx" in line and "..." in line and len(line) < 350 and "\n" not in line
    assert sum(calls) - 7 <= 8  # the search costs about one more call


def test_an_error_of_no_single_prompt_names_the_batch():
    def needs_one(prompts, responses):
        if len(prompts) > 1:
            raise ValueError("one\nat a time")
        return [0.0]

    with pytest.raises(UserError, match=r"raised ValueError: one at a time \(.*\), 2 prompts, the first is 'p'"):
        call_text_function(needs_one, *TWO)
    with pytest.raises(UserError, match="raised SystemExit"):
        call_text_function(lambda prompts, responses: sys.exit("tired"), *TWO)


def test_an_interrupt_is_no_error_of_the_function():
    def interrupted(prompts, responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_text_function(interrupted, *TWO, timeout=5)


@pytest.mark.parametrize("swallows", [False, True])
def test_a_function_that_hangs_ends_at_its_time_limit(swallows):
    def hangs(prompts, responses):
        while True:
            try:
                time.sleep(60)
            except Exception:
                assert swallows  # the limit must not arrive here

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match=r"hangs: no answer within 0.2 seconds, 2 prompts, the first is 'p'.*timeout"):
        call_text_function(hangs, *TWO, timeout=0.2)
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_generator_runs_under_the_same_care():
    def lazy(prompts, responses):
        yield 1.0
        raise OSError("gone")

    with pytest.raises(UserError, match="raised OSError: gone"):
        call_text_function(lazy, *TWO)
    assert call_text_function(lambda prompts, responses: (float(len(p)) for p in prompts), *TWO) == [1.0, 2.0]


def test_outside_the_main_thread_there_is_no_limit_but_no_harm():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(call_text_function, names_both, *TWO, timeout=5).result() == [2.0, -1.0]


def test_a_bad_value_is_shown_with_its_prompt():
    with pytest.raises(UserError, match=r"value 1 is nan, for prompt 'pp': return finite floats only"):
        call_text_function(lambda prompts, responses: [0.0, float("nan")], *TWO)


def test_function_name():
    class Reward:
        def __call__(self, prompts, responses): ...

    assert function_name(names_both).endswith("test_evaluation_functions:names_both")
    assert function_name(functools.partial(names_both)).endswith(":names_both")
    assert function_name(Reward()).endswith("Reward")
