"""Foreign artifacts run no code and reach no file outside; secrets of the environment stay where they are."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rlhf import models
from rlhf.artifacts import Artifact, check_name, payload_hash
from rlhf.data import load_data_recipe
from rlhf.data.recipe import PackageSource
from rlhf.data.sources import source_files
from rlhf.errors import UserError
from rlhf.models import base_path, load_model, load_tokenizer
from rlhf.recipe import ModelSection, load_recipe
from rlhf.stage import allow_remote_code, run_stage
from tests.builders import build_model, build_recipe, build_sft_artifact, build_tokenizer, toy_recipe
from tests.integration.conftest import PLANTED
from tests.ppo_toys import build_artifacts

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------------------ foreign weights
class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "ran")


@pytest.fixture
def base(tmp_path):
    """A base model's folder."""
    folder = tmp_path / "base"
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["causal", "score"])
def test_pickled_weights_are_refused_and_not_read(base, tmp_path, kind):
    (base / "model.safetensors").unlink()
    mark = tmp_path / "mark"
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UserError, match=r"pickled weights.*convert it to safetensors"):
        load_model(base, kind)
    assert not mark.exists()
    pickle.loads((base / "pytorch_model.bin").read_bytes())
    assert mark.exists()  # the bomb was live


def test_pickled_weights_beside_safe_ones_are_ignored(base, tmp_path):
    torch.save({"weight": Bomb(tmp_path / "mark")}, base / "pytorch_model.bin")
    load_model(base)
    assert not (tmp_path / "mark").exists()


def test_a_finished_run_holds_no_pickle(ci_run):
    names = [path.name for path in ci_run.rglob("*") if path.is_file()]
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle"))]


# ---------------------------------------------------------------------------------------------------------- remote code
CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

Path(__file__).with_name("imported").touch()


class ToyConfig(GPT2Config):
    model_type = "toy_remote"


class ToyModel(GPT2LMHeadModel):
    config_class = ToyConfig


class ToyScore(GPT2ForSequenceClassification):
    config_class = ToyConfig
"""


@pytest.fixture
def remote(base, monkeypatch, tmp_path):
    """A base whose model is defined by a Python file that it ships."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(models, "trust_remote_code", False)
    (base / "toy.py").write_text(CODE, encoding="utf-8")
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "toy.ToyConfig", "AutoModelForCausalLM": "toy.ToyModel"}
    classes["AutoModelForSequenceClassification"] = "toy.ToyScore"
    config |= {"model_type": "toy_remote", "auto_map": classes}
    (base / "config.json").write_text(json.dumps(config))
    return base


def imported(tmp_path):
    return list(tmp_path.rglob("imported"))


def test_code_that_a_model_ships_does_not_run(remote, tmp_path):
    with pytest.raises(UserError, match="trust_remote_code"):
        load_model(remote)
    with pytest.raises(UserError, match="trust_remote_code"):
        models.position_limit(remote)
    load_tokenizer(remote)
    assert not imported(tmp_path)


def test_remote_code_is_announced_and_goes_along_to_later_stages(remote, tmp_path, caplog):
    from rlhf.reward.train import STAGE as REWARD
    from rlhf.sft import STAGE as SFT

    model = {"base": str(remote), "trust_remote_code": True}
    recipe = build_recipe(tmp_path, model=model)
    sft = run_stage(SFT, recipe, tmp_path, "toy")
    (line,) = [record.getMessage() for record in caplog.records if "trust_remote_code" in record.getMessage()]
    assert str(remote) in line and imported(tmp_path)
    assert (sft.model_dir / "toy.py").is_file() and "model/toy.py" in sft.manifest["files"]
    run_stage(REWARD, recipe, tmp_path, "toy")
    assert type(load_model(tmp_path / "toy" / "reward" / "model", "score")).__name__ == "ToyScore"
    allow_remote_code(build_recipe(tmp_path, model={"base": str(remote)}))  # another recipe, the same process
    with pytest.raises(UserError, match="trust_remote_code"):
        load_model(sft.model_dir)


# --------------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "model/../../outside", "link", "links/inner"])
def test_a_manifest_cannot_name_a_file_outside(tmp_path, name):
    artifact = build_sft_artifact(tmp_path)
    outside = artifact.path.parent / "outside"
    outside.write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").write_text("x")
    (artifact.path / "link").symlink_to(outside)
    (artifact.path / "links").symlink_to(tmp_path / "folder")
    artifact.verify()
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    manifest["files"][name] = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of "x"
    manifest["payload_hash"] = payload_hash(manifest["files"])  # whoever plants a file can do that, too
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="outside the artifact"):
        Artifact.load(artifact.path).verify()


def test_an_artifact_may_itself_be_reached_through_a_link(tmp_path):
    artifact = build_sft_artifact(tmp_path / "disk")
    (tmp_path / "artifacts").symlink_to(tmp_path / "disk")
    linked = Artifact.load(tmp_path / "artifacts" / artifact.path.relative_to(tmp_path / "disk"))
    linked.verify()
    assert linked.hash == artifact.hash


@pytest.mark.parametrize("run", ["../out", "/tmp/out", "..", ".", ".hidden", "a/b", "a\nb"])
def test_a_run_stays_below_the_artifact_directory(tmp_path, run):
    from rlhf.sft import STAGE

    with pytest.raises(UserError, match="not a plain name"):
        run_stage(STAGE, build_recipe(tmp_path), tmp_path / "artifacts", run)
    with pytest.raises(UserError, match="not a plain name"):  # the recipe's name is the default
        run_stage(STAGE, build_recipe(tmp_path).model_copy(update={"name": run}), tmp_path / "artifacts")
    assert not (tmp_path / "artifacts").exists()
    assert check_name("kl_0.1-b+c", "--run") == "kl_0.1-b+c"


def test_data_and_models_stay_in_their_folders():
    with pytest.raises(UserError, match="no plain name"):
        load_data_recipe("../pipelines/recipes/tiny")
    with pytest.raises(UserError, match="lies outside package"):
        source_files(PackageSource(package="rlhf", module="rlhf", file="../README.md"))
    with pytest.raises(UserError, match=r"outside model\.package"):
        base_path(ModelSection(base="../tests", package="rlhf"))


# -------------------------------------------------------------------------------------------------------------- secrets
def found(secret: str, folder: Path) -> list[str]:
    """Files that hold the secret, in UTF-8 or UTF-16."""
    forms = secret.encode(), secret.encode("utf-16-le")
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(form in path.read_bytes() for form in forms)]


@pytest.mark.parametrize("name", PLANTED)
def test_a_finished_run_holds_no_secret_of_the_environment(ci_run, name):
    assert len(list(ci_run.rglob("manifest.json"))) == 5 and list(ci_run.rglob("events.out.tfevents*"))
    assert found(PLANTED[name], ci_run.parent) == []  # the output of the stages is a file there, too


def test_found_finds(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x00planted-a\x00")
    assert found("planted-a", tmp_path) and not found("planted-b", tmp_path)


LEAKY = """
import os

def leaks(prompts, responses):
    raise RuntimeError("401: bad key " + os.environ["OPENAI_API_KEY"])
"""


def test_secrets_in_a_recipe_or_an_error_are_hidden(tmp_path):
    """A token given as a setting, a login in a URL, and a function whose error quotes the environment."""
    token, login = "given-on-the-command-line", "https://anna:sesame@data.example.org/base"
    build_artifacts(tmp_path / "artifacts", lora=False)
    recipe = toy_recipe(tmp_path, ppo={"rewards": [{"function": "leaky:leaks"}], "critic_init": "sft"})
    recipe["description"] = f"from {login}"
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (tmp_path / "leaky.py").write_text(LEAKY, encoding="utf-8")
    shutil.copytree(tmp_path / "artifacts" / "toy" / "sft" / "model", tmp_path / "base")
    environment = os.environ | PLANTED | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def run(stage, *arguments):
        command = [sys.executable, "-m", f"pipelines.{stage}", "--recipe", "toy.yaml", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    failed = run("ppo")
    assert failed.returncode == 2 and "leaks: raised RuntimeError: 401: bad key <hidden>" in failed.stderr
    shown = run("sft", "--dry-run", f"sft.trainer.hub_token={token}")
    assert shown.returncode == 0 and "hub_token: <hidden>" in shown.stdout and "max_steps: 1" in shown.stdout
    built = run("sft", "--force", f"sft.trainer.hub_token={token}", "logging.report_to=[tensorboard]")
    assert built.returncode == 0, built.stderr
    manifest = json.loads((tmp_path / "artifacts" / "toy" / "sft" / "manifest.json").read_text())
    assert manifest["recipe"]["sft"]["trainer"]["hub_token"] == "<hidden>"
    assert "https://<hidden>@data" in manifest["recipe"]["description"]
    again = run("sft", f"sft.trainer.hub_token={token}", "logging.report_to=[tensorboard]")
    assert "unchanged, skipped" in again.stdout  # hidden in the fingerprint, and yet the same
    for secret in (token, "sesame", *PLANTED.values()):
        assert found(secret, tmp_path / "artifacts") == []
        for done in (failed, shown, built, again):
            assert secret not in done.stdout + done.stderr


def test_an_error_that_nobody_caught_is_shown_without_secrets(tmp_path):
    (tmp_path / "leaky.py").write_text("import os\nraise RuntimeError(os.environ['OPENAI_API_KEY'])\n")
    code = "from pipelines.cli import setup_logging; setup_logging(); import leaky"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | PLANTED | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and "RuntimeError: <hidden>" in done.stderr
    assert PLANTED["OPENAI_API_KEY"] not in done.stderr


def test_a_recipe_keeps_its_real_values(tmp_path):
    """Hidden is what is written; the trainer still gets the token."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(toy_recipe(tmp_path)), encoding="utf-8")
    recipe = load_recipe(str(tmp_path / "r.yaml"), ["sft.trainer.hub_token=real"])
    assert recipe.sft.trainer["hub_token"] == "real"
