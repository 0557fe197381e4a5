"""The documents say what is: generated pages are fresh, links lead somewhere, code that is named exists."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
SYMBOL = re.compile(r"`([\w./-]+\.py):([\w.]+)`")
FILE = re.compile(r"`((?:rlhf|pipelines|tests|docs|data_recipes|benchmarks)/[\w./-]+\.\w+)`")


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request):
    return request.param


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def names_in(source: str) -> set[str]:
    """Functions, classes and assigned names of a module, and `Class.member`."""
    return set(_names(ast.parse(source).body, ""))


def _names(body, prefix):
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _names(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_pages():
    assert {page.name for page in PAGES} >= {"ppo.md", "architecture.md", "metrics.md", "recipes.md"}


def test_recipe_reference_is_fresh():
    spec = importlib.util.spec_from_file_location("generate_recipes", ROOT / "docs" / "generate_recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert written == module.recipe_reference(), "run `python docs/generate_recipes.py`"


def test_relative_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: no such heading"


def test_code_that_is_named_exists(page):
    text = prose(page)
    for file, name in SYMBOL.findall(text):
        assert (ROOT / file).is_file(), f"{page.name}: {file}:{name}"
        assert name in names_in((ROOT / file).read_text(encoding="utf-8")), f"{page.name}: {file}:{name}"
    for file in FILE.findall(text):
        assert file.endswith("NAME.yaml") or (ROOT / file).is_file(), f"{page.name}: {file}"


def test_the_checks_can_fail():
    assert names_in("X: int = 1\nY = 2\nclass A:\n    z = 1\n    def b(self): pass\n") == {"X", "Y", "A", "A.z", "A.b"}
    assert SYMBOL.findall("`rlhf/a.py:B.c` and `not code`") == [("rlhf/a.py", "B.c")]
    assert LINK.findall("[a](b.md#c) [d](https://e.org)") == ["b.md#c", "https://e.org"]


def test_ppo_page_names_the_code():
    assert len(SYMBOL.findall(prose(ROOT / "docs" / "ppo.md"))) > 30
