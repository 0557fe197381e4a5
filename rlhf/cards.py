"""The model card beside every published model: what it is, what it was made from, what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.redact import redact, redact_tree
from rlhf.stage import StageContext

LOADERS = {"reward": "AutoModelForSequenceClassification"}


def write_card(ctx: StageContext, metrics: dict[str, Any], summary: str, directory: str = "model") -> None:
    """Write README.md into the published folder. It holds no times, so that equal models have equal cards."""
    recipe = ctx.recipe
    data = "\n".join(f"- `{name}`" for name in sorted(set(ctx.stage.data(recipe)))) or "- none"
    inputs = "\n".join(f"- `{name}` ({artifact.hash[:12]})" for name, artifact in ctx.inputs.items())
    base = redact(recipe.model.base or "trained from scratch")
    rows = "\n".join(f"| {key} | {_number(value)} |" for key, value in metrics.items())
    section = redact_tree(recipe.section(ctx.stage.name).model_dump(mode="json"))
    settings = json.dumps(section, indent=2, ensure_ascii=False)
    loader = LOADERS.get(ctx.stage.name, "AutoModelForCausalLM")
    text = f"""---
library_name: transformers
tags: [rlhf, {ctx.stage.name}]
---
# {ctx.run}/{ctx.stage.name}

{summary}

```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("{directory}")
tokenizer = AutoTokenizer.from_pretrained("{directory}")
```

Base: {base}. Seed {ctx.seed}.

## Made from
{inputs or f"- {base}"}

Data recipes:
{data}

## Measured
| measure | value |
| --- | --- |
{rows}

## Settings
```json
{settings}
```
"""
    (Path(ctx.dir) / directory / "README.md").write_text(text, encoding="utf-8")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
