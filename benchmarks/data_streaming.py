"""Memory and time of `make data` on a made-up JSON Lines file: `python -m benchmarks.data_streaming --gb 5`.

The file and what is written from it go into a temporary folder, three times its size, and are deleted. The peak is the
resident memory of the process and its workers together, looked at ten times a second.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import yaml

from benchmarks.data_cleaning import HAN, PERSONAL, WORDS

LIGHT = ["unicode", "length", "boilerplate", "pii", "exact_duplicates"]


def write_source(path: Path, count: int, units: int, seed: int = 0) -> None:
    """`count` rows of about `units` words, half English and half Chinese; every 50th repeats the one before."""
    rng = random.Random(seed)
    english, chinese = rng.choices(WORDS, k=20_000), rng.choices(list(HAN), k=20_000)
    row = {"prompt": "p", "completion": "c"}
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            if number % 50:
                source, glue = (english, " ") if number % 2 else (chinese, "")
                start, size = rng.randrange(len(source) - units), units * rng.randint(50, 100) // 100
                # Overlapping pieces are fast to make, and near duplicates of each other.
                words = source[start : start + size] if units > 200 else rng.choices(source, k=size)
                end = " " + rng.choice(PERSONAL) if number % 20 == 1 else ""
                row = {"prompt": f"{number} {glue.join(words[:8])}", "completion": glue.join(words[8:]) + end}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def resident(pid: int) -> int:
    """Bytes of memory that a process and its children hold."""
    total = 0
    for process in [pid, *children(pid)]:
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue  # it ended meanwhile
    return total


def cpu_seconds() -> float:
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def children(pid: int) -> list[int]:
    """Processes below a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            direct = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        found += [*direct, *(below for child in direct for below in children(child))]
    return found


def run(folder: Path, recipe: Path, workers: int) -> dict[str, float | int]:
    """One `make data`; seconds, peak and what came out."""
    command = [sys.executable, "-m", "pipelines.data", "--recipe", str(recipe), "--artifacts", str(folder / "out")]
    start, peak, done, before = time.time(), 0, threading.Event(), cpu_seconds()
    process = subprocess.Popen([*command, "--force", "--workers", str(workers)], stdout=subprocess.DEVNULL)
    threading.Thread(target=lambda: (process.wait(), done.set())).start()
    while not done.wait(0.1):
        peak = max(peak, resident(process.pid))
    if process.returncode:
        raise SystemExit(process.returncode)
    manifest = json.loads((folder / "out" / "data" / "big" / "manifest.json").read_text(encoding="utf-8"))
    seconds = time.time() - start
    return {
        "workers": workers,
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds() - before),
        "rows_per_s": round(manifest["steps"]["read"] / seconds),
        "peak_gib": round(peak / 2**30, 3),
        "kept": manifest["steps"]["kept"],
    }


def main() -> None:
    """Prints one JSON line per number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, help="size of the file; or give --rows")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--units", type=int, default=60, help="most words (Chinese: characters) of a row")
    parser.add_argument("--steps", nargs="+", default=LIGHT, help="cleaning steps, or `default`")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = int(args.gb * 1e9 / (args.units * 3.2)) if args.gb else args.rows
        write_source(folder / "big.jsonl", count, args.units)
        recipe = {"name": "big", "source": {"files": str(folder / "big.jsonl")}, "format": "prompt_completion"}
        recipe["clean"] = [{"step": step} for step in args.steps]
        (folder / "big.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        size = (folder / "big.jsonl").stat().st_size
        for workers in args.workers:
            figures = {"gb": round(size / 1e9, 2), "rows": count, "steps": " ".join(args.steps)}
            print(json.dumps(figures | run(folder, folder / "big.yaml", workers)), flush=True)


if __name__ == "__main__":
    main()
