"""A stage on data of one's own: it reads the cleaned set, and its manifest leads back to the source's bytes."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from rlhf.artifacts import Artifact
from rlhf.stage import run_stage
from tests.builders import build_model, build_recipe, build_tokenizer, write_rows

SHORT = {"max_length": 48, "eos_prompts": 2, "trainer": {"max_steps": 1}}


def test_sft_trains_on_the_cleaned_set_and_names_the_bytes(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    from rlhf.sft import STAGE

    rows = [{"prompt": f"film {n * n}", "completion": f" a joy, number {n}"} for n in range(30)]
    rows += [
        rows[3],
        {"prompt": "mail", "completion": " to ann@example.org"},
        {"prompt": "hm", "completion": " so" * 40},
    ]
    source = write_rows(tmp_path / "mine.jsonl", rows)
    split = {"fractions": {"train": 0.7, "validation": 0.3}}
    data = {"name": "mine", "source": {"files": str(source)}, "split": split}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = build_recipe(tmp_path, sft={"data": str(tmp_path / "mine.yaml")} | SHORT)
    artifact = run_stage(STAGE, recipe, tmp_path / "artifacts")
    assert artifact is not None

    cleaned = Artifact.load(tmp_path / "artifacts" / "data" / "mine")
    cleaned.verify()
    digest = hashlib.sha256(hashlib.sha256(source.read_bytes()).hexdigest().encode()).hexdigest()
    (found,) = artifact.manifest["data"].values()
    assert found["source_sha256"] == cleaned.manifest["source_hash"] == digest
    assert found["fingerprint"] == cleaned.manifest["fingerprint"]
    texts = [
        json.loads(line)["completion"]
        for split in ("train", "validation")
        for line in (cleaned.path / "rows" / f"{split}.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(texts) == len(set(texts))  # the copy is gone
    assert " to <EMAIL_1>" in texts
    assert not any("so so" in text for text in texts)

    write_rows(source, rows[:-1])
    again = run_stage(STAGE, recipe, tmp_path / "artifacts")
    assert again is not None
    (new,) = again.manifest["data"].values()
    assert new["source_sha256"] != digest
    assert new["fingerprint"] == Artifact.load(cleaned.path).manifest["fingerprint"]

    other = build_model(build_tokenizer())
    with torch.no_grad():
        other.transformer.wte.weight += 0.1
    other.save_pretrained(tmp_path / "base")  # other weights in the same folder: not what the stage was made from
    rebuilt = run_stage(STAGE, recipe, tmp_path / "artifacts")
    assert rebuilt is not None and rebuilt.hash != again.hash
    before, now = (found.manifest["fingerprint"]["also"]["base"] for found in (again, rebuilt))
    assert {name for name in now if now[name] != before[name]} == {"model.safetensors"}
    assert "tokenizer.json" in now
    assert (
        run_stage(STAGE, recipe, tmp_path / "artifacts").manifest["finished"] == rebuilt.manifest["finished"]
    )  # skipped
