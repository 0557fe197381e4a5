"""Settings of every test: offline, quiet, two threads, no clock in property tests."""

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # a launcher around pytest is not part of the tests
    os.environ.pop(name, None)

# The same examples every time: a change is judged by what it changed. HYPOTHESIS_PROFILE=search looks for new ones;
# mutation is the short one of `make mutation`.
settings.register_profile("rlhf", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None)
settings.register_profile(
    "mutation",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.differing_executors],  # mutmut runs the suite more than once in one process
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "rlhf"))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file run in one process (`make test` has several), and so do all that share the run of `ci`."""
    for item in items:
        shared = "ci_run" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ci_run" if shared else item.path.name))
