"""Agreement against values that others published or that were worked out by hand."""

import pytest

from rlhf.labels.agreement import agreement, cohen_kappa, krippendorff_alpha, percent_agreement


def items(*columns: str) -> list[dict[str, str]]:
    """One string per annotator, one character per item; `.` = not labelled."""
    return [{str(name): label for name, label in enumerate(row) if label != "."} for row in zip(*columns, strict=True)]


def test_percent_counts_pairs_of_annotators():
    # First item: 1 of 3 pairs agree; second: the only pair does; third has no pair.
    assert percent_agreement(items("aaa", "aa.", "b..")) == pytest.approx(2 / 4)
    assert percent_agreement(items("ab", "..")) is None


def test_kappa_of_cohen():
    # The usual example: 20 both yes, 15 both no, 5 and 10 not: observed 0.7, expected 0.5.
    table = items("y" * 20 + "y" * 5 + "n" * 10 + "n" * 15, "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15)
    assert cohen_kappa(table, "0", "1") == pytest.approx(0.4)
    assert cohen_kappa(items("abt", "abt"), "0", "1") == pytest.approx(1.0)
    assert cohen_kappa(items("ab", "ba"), "0", "1") == pytest.approx(-1.0)
    assert cohen_kappa(items("aa.", "aab"), "0", "1") is None  # both said a throughout
    assert cohen_kappa(items("a.", ".b"), "0", "1") is None


def test_alpha_of_krippendorff():
    # Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, C: four observers, some values missing.
    observers = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    assert krippendorff_alpha(items(*observers)) == pytest.approx(0.743, abs=5e-4)
    # Two observers, two labels (same paper, A): 10 items, 6 agree: alpha 0.095.
    assert krippendorff_alpha(items("0100000000", "1110010100")) == pytest.approx(0.095, abs=5e-4)
    assert krippendorff_alpha(items("aa", "aa")) is None
    assert krippendorff_alpha(items("a.", ".b")) is None


def test_summary_counts_what_counts():
    def row(pair, annotator, label):
        return {"pair": pair, "annotator": annotator, "label": label}

    rows = [row("p", "x", "a"), row("p", "y", "b"), row("p", "y", "undo"), row("p", "y", "a"), row("q", "x", "tie")]
    rows += [row("q", "y", "skip"), row("r", "x", "b"), row("r", "y", "tie")]
    found = agreement(rows)
    assert found["annotators"] == {"x": 3, "y": 2}
    assert found["labels"] == {"a": 2, "b": 1, "tie": 2}
    assert (found["overlap"], found["percent"]) == (2, 0.5)
    # Of both: x says a, b; y says a, tie: observed 1/2, expected 1/4.
    assert found["kappa"] == pytest.approx((1 / 2 - 1 / 4) / (3 / 4))
    assert agreement([])["percent"] is None
