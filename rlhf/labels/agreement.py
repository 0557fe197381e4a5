"""How far annotators agree, beyond what chance would give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from rlhf.labels.records import VOTES, Row, decided

Item = Mapping[str, str]  # annotator -> label, of one pair


def percent_agreement(items: Sequence[Item]) -> float | None:
    """Share of equal labels among all pairs of annotators who labelled the same item; None where there are none."""
    equal = [first == second for item in items for first, second in combinations(item.values(), 2)]
    return sum(equal) / len(equal) if equal else None


def cohen_kappa(items: Sequence[Item], first: str, second: str) -> float | None:
    """Cohen's kappa (1960) of two annotators on the items that both labelled.

    (observed - expected) / (1 - expected), expected from each one's own label frequencies. None where it is not
    defined: nothing in common, or both gave one and the same label throughout.
    """
    both = [(item[first], item[second]) for item in items if first in item and second in item]
    if not both:
        return None
    observed = sum(one == two for one, two in both) / len(both)
    ones, twos = Counter(one for one, _ in both), Counter(two for _, two in both)
    expected = sum(ones[label] * twos[label] for label in ones) / len(both) ** 2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(items: Sequence[Item]) -> float | None:
    """Krippendorff's alpha (2011) for nominal labels: any number of annotators, each of whom may have missed items.

    1 - observed / expected disagreement. None where no item has two labels, or only one label was ever given.
    """
    units = [Counter(item.values()) for item in items if len(item) > 1]
    totals: Counter[str] = sum(units, Counter())
    n = totals.total()
    if n == 0 or len(totals) < 2:
        return None
    agreeing = sum(
        count * (count - 1) / (unit.total() - 1) for unit in units for count in unit.values()
    )  # the coincidence matrix's diagonal
    expected = sum(count * (count - 1) for count in totals.values()) / (n - 1)
    return 1 - (n - agreeing) / (n - expected)


def agreement(labels: Sequence[Row]) -> dict[str, Any]:
    """What to show of the decisions in labels.jsonl; skipped and undone ones do not count.

    Returns:
        `annotators` (name -> number of votes), `labels` (a, b, tie -> votes), `overlap` (pairs with two votes or more),
        `percent`, `alpha`, and with exactly two annotators `kappa`; None where not defined.
    """
    items = [
        {name: row["label"] for name, row in by_annotator.items() if row["label"] in VOTES}
        for by_annotator in decided(labels).values()
    ]
    names = Counter(name for item in items for name in item)
    given = Counter(label for item in items for label in item.values())
    return {
        "annotators": dict(sorted(names.items())),
        "labels": {label: given[label] for label in VOTES},
        "overlap": sum(len(item) > 1 for item in items),
        "percent": percent_agreement(items),
        "kappa": cohen_kappa(items, *sorted(names)) if len(names) == 2 else None,
        "alpha": krippendorff_alpha(items),
    }
