"""Speed of the cleaning steps on made-up short rows: `python -m benchmarks.data_cleaning [--rows N] [--minhash N]`.

Rows/s/core is rows over process CPU time of one process. The rows are random words and characters in English and
Chinese in equal parts, 20 to 60 units each; 1 in 20 holds personal data. Real text is no harder for the rules.
"""

import argparse
import json
import random
import re
import resource
import time

from rlhf.data.cleaning import (
    SCOPE,
    BoilerplateStep,
    ExactStep,
    LanguageStep,
    LengthStep,
    NearStep,
    PiiStep,
    RepetitionStep,
    SensitiveStep,
    StepConfig,
    UnicodeStep,
    run_step,
)

WORDS = re.findall(
    r"\w+",
    """the of and to a in is it you that he was for on are with as I his they be at one have this from or had by hot but
    some what there we can out other were all your when up use word how said each she which do their time if will way
    about many then them would write like so these her long make thing see him two has look more day could go come did
    my sound no most number who over know water than call first people may down side been now find any new work part""",
)
HAN = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行"
)
PERSONAL = [
    "mail zhang.san@example.com",
    "电话13800138000",
    "call (212) 555-0123",
    "卡号4111111111111111",
    "ip 203.0.113.9",
]


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` rows with a prompt and a completion."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        units, glue = (WORDS, " ") if number % 2 else (list(HAN), "")
        text = glue.join(rng.choices(units, k=rng.randint(20, 60)))
        end = rng.choice(PERSONAL) if number % 20 == 0 else ""
        rows.append({"prompt": text[:40], "completion": f"{text[40:]}. {end}"})
    return rows


def measure(config: StepConfig, rows: list[dict[str, str]]) -> dict[str, float | int | str]:
    """Runs one step and says how fast."""
    run_step(config, rows[:100])  # imports and caches
    start = time.process_time()
    result = run_step(config, rows)
    seconds = time.process_time() - start
    name = str(config.model_dump()["step"])
    kept = len(result.rows)
    return {"step": name, "scope": SCOPE[name], "rows_per_s_core": round(len(rows) / seconds), "kept": kept}


def main() -> None:
    """Prints one JSON line per step, then the rule steps together and the near duplicates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--minhash", type=int, default=100_000)
    args = parser.parse_args()
    rows = make_rows(args.rows)
    words = [f"forbidden{number}" for number in range(2000)] + [f"禁词{number}" for number in range(2000)]
    rules: list[StepConfig] = [
        *(UnicodeStep(), LengthStep(), RepetitionStep(), BoilerplateStep(), SensitiveStep(words=words), PiiStep())
    ]
    figures = [measure(config, rows) for config in rules]
    together = round(1 / sum(1 / float(item["rows_per_s_core"]) for item in figures))
    for item in [*figures, {"step": "all rule steps", "rows_per_s_core": together}, measure(LanguageStep(), rows)]:
        print(json.dumps(item), flush=True)
    many = make_rows(args.minhash, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for config in (ExactStep(), NearStep()):
        print(json.dumps(measure(config, many) | {"rows": len(many)}), flush=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"memory beside the rows, MB": round(grown / 1e3), "rows": len(many)}))


if __name__ == "__main__":
    main()
