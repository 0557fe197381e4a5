"""Imports go one way, the library is silent, and functions stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted((ROOT / "rlhf").rglob("*.py"))
ENTRY_POINTS = sorted((ROOT / "pipelines").rglob("*.py"))
MATHS = [f"rlhf/ppo/{name}.py" for name in ("masking", "advantages", "losses")] + ["rlhf/reward/losses.py"]
USES_TRL = ("rlhf/sft.py", "rlhf/reward/", "rlhf/ppo/generation/vllm")
LONGEST_FUNCTION = 60


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(source: str, package: str = "") -> set[str]:
    """Dotted names that a file imports anywhere, inside functions and `if TYPE_CHECKING` too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def tops(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def lengths_of_functions(source: str) -> dict[str, int]:
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {f"{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1 for node in functions}


def test_scanner_sees_every_way_to_import():
    source = """
import a.b
from c import d
def f():
    from e.f import g
    importlib.import_module("h.i")
from . import j
from ..k import l
"""
    assert imported_modules(source, "rlhf.ppo") == {
        *("a.b", "c", "c.d", "e.f", "e.f.g", "h.i", "rlhf.ppo", "rlhf.ppo.j", "rlhf.k", "rlhf.k.l"),
    }


def test_there_are_files_to_scan():
    assert len(LIBRARY) > 30
    assert {"sft.py", "reward.py", "ppo.py", "evaluate.py", "cli.py"} <= {path.name for path in ENTRY_POINTS}
    assert all((ROOT / name).is_file() for name in MATHS)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_imports_nothing_that_uses_it(path):
    assert not tops(imported_modules(path.read_text("utf-8"))) & {"pipelines", "tests", "notebooks", "benchmarks"}


@pytest.mark.parametrize("path", [p for p in LIBRARY if not name_of(p).startswith(USES_TRL)], ids=name_of)
def test_only_sft_and_reward_import_trl(path):
    assert "trl" not in tops(imported_modules(path.read_text("utf-8")))


def test_sft_and_reward_do_import_trl():
    for name in ("rlhf/sft.py", "rlhf/reward/train.py"):
        assert "trl" in tops(imported_modules((ROOT / name).read_text("utf-8")))


@pytest.mark.parametrize("name", MATHS)
def test_maths_imports_torch_alone(name):
    modules = imported_modules((ROOT / name).read_text("utf-8"))
    foreign = {
        m for m in modules if not m.startswith(("torch", "rlhf")) and m.split(".")[0] not in sys.stdlib_module_names
    }
    ours = {m for m in modules if m.startswith("rlhf")}
    maths = tuple(path.removesuffix(".py").replace("/", ".") for path in MATHS)
    assert not foreign
    assert all(module.startswith(maths) for module in ours), ours


@pytest.mark.parametrize(
    ("imports", "absent"),
    [
        ("rlhf.recipe, rlhf.artifacts, rlhf.metrics, rlhf.errors, rlhf.yamlio", ("torch", "transformers", "pandas")),
        ("rlhf.data, pipelines.cli", ("torch", "transformers", "datasets")),
        ("rlhf.ppo.masking, rlhf.ppo.advantages, rlhf.ppo.losses, rlhf.reward.losses", ("transformers", "accelerate")),
        ("rlhf.ppo.stage, rlhf.evaluation.stage", ("trl",)),
    ],
    ids=["recipe", "data", "maths", "ppo"],
)
def test_heavy_packages_stay_out(imports, absent):
    code = f"import sys, {imports}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_neither_prints_nor_reads_argv(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), (
            f"print, line {node.lineno}"
        )
        assert not (isinstance(node, ast.Attribute) and node.attr == "argv"), f"argv, line {node.lineno}"
        assert not (isinstance(node, ast.alias) and node.name in ("argv", "argparse")), "argv"


def test_length_counts_the_whole_body():
    body = "\n".join(f"        x = {i}" for i in range(70))
    assert lengths_of_functions(f"class A:\n    def f(self):\n{body}\n") == {"f:2": 71}


@pytest.mark.parametrize("path", LIBRARY + ENTRY_POINTS, ids=name_of)
def test_no_function_is_longer_than_sixty_lines(path):
    lengths = lengths_of_functions(path.read_text("utf-8"))
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("path", LIBRARY + ENTRY_POINTS, ids=name_of)
def test_no_blanket_except(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            named = {getattr(n, "id", "") for n in ast.walk(node.type)} if node.type else {"Exception"}
            assert not named & {"Exception", "BaseException"}, f"line {node.lineno}"
