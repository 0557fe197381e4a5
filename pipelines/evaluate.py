"""Run the evaluate stage: `python -m pipelines.evaluate --recipe tiny [section.key=value ...]`."""

from pipelines.cli import leave, main
from rlhf.artifacts import Artifact
from rlhf.evaluation.frontier_report import sentences
from rlhf.evaluation.report import comparison_table, display_name, part_table


def show(artifact: Artifact) -> None:
    """Print the table and where the picture is."""
    comparison = artifact.manifest["comparison"]
    first, *others = map(display_name, comparison["policies"])
    prompts = f"{comparison['num_prompts']} held-out prompts"
    print(f"\n{' and '.join(others)} against {first} on {prompts}, with 95 % intervals:\n")
    print(comparison_table(comparison))
    if of_parts := part_table(comparison):
        print(f"\n{of_parts}")
    for sentence in sentences(comparison["frontier"]) if "frontier" in comparison else ():
        print(f"\n{sentence}")
    print(f"\npicture: {artifact.path / 'comparison.png'}   samples: {artifact.path / 'report.md'}")


if __name__ == "__main__":
    leave(main("evaluate", "rlhf.evaluation.stage", show=show))
