"""Which row belongs to which split. Decided before pairing, cleaning or filtering, so that nothing crosses."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from rlhf.data.recipe import SplitSpec
from rlhf.errors import UserError


def group_key(value: Any) -> str:
    """The identity of a value for splitting: case, spacing and Unicode form do not tell two texts apart."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def assign_splits(keys: list[str], spec: SplitSpec) -> list[str | None]:
    """Assigns each row to a split by its group key.

    With `fractions`, a key's split depends on the key and the seed alone: adding rows moves none, and two data sets
    with the same seed and fractions put a shared key on the same side. With `rows`, groups in a seeded order fill the
    splits to their exact counts, one after the other; a group that does not fit goes to the next split with room.

    Args:
        keys: group key per row; equal keys get the same split.
        spec: fractions or counts, and the seed.

    Returns:
        A split name per row, None for rows that no split takes. It does not depend on the order of the rows.

    Raises:
        UserError: fewer rows than the counts ask for.
    """
    sizes = Counter(keys)
    side = split_sides(spec, sizes)
    return [side(key) for key in keys]


def needs_sizes(spec: SplitSpec) -> bool:
    """Whether a row's split depends on the other rows, so that all group keys have to be known first."""
    return spec.rows is not None or spec.max_rows is not None


def split_sides(spec: SplitSpec, sizes: Mapping[str, int]) -> Callable[[str], str | None]:
    """The function from group key to split name; `assign_splits` says how it decides.

    Args:
        spec: fractions or counts, and the seed.
        sizes: rows per group key; read only where `needs_sizes`.
    """
    if not needs_sizes(spec):
        return lambda key: _by_fraction(key, spec)
    if spec.max_rows is not None:
        sizes = _first_groups(sizes, spec.seed, spec.max_rows)
    if spec.rows is not None:
        return _fill_counts(sizes, spec.rows, spec.seed).get
    return {key: _by_fraction(key, spec) for key in sizes}.get


def _unit(purpose: str, seed: int, key: str) -> float:
    """A number in [0, 1) that is uniform over keys; `purpose` keeps uses of one seed independent of each other."""
    digest = hashlib.sha256(f"{purpose} {seed} {key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _by_fraction(key: str, spec: SplitSpec) -> str | None:
    u, upper = _unit("split", spec.seed, key), 0.0
    for name, share in spec.shares.items():
        upper += share
        if u < upper:
            return name
    # Shares that sum to 1 but for rounding must not lose the key just below 1.
    return name if upper > 1 - 1e-9 else None


def _first_groups(sizes: Mapping[str, int], seed: int, max_rows: int) -> dict[str, int]:
    kept: dict[str, int] = {}
    total = 0
    for key in sorted(sizes, key=lambda key: (_unit("max_rows", seed, key), key)):
        if total + sizes[key] <= max_rows:
            kept[key] = sizes[key]
            total += sizes[key]
    return kept


def _fill_counts(sizes: Mapping[str, int], counts: dict[str, int], seed: int) -> dict[str, str | None]:
    room = dict(counts)
    side: dict[str, str | None] = {}
    for key in sorted(sizes, key=lambda key: (_unit("rows", seed, key), key)):
        name = next((name for name, left in room.items() if sizes[key] <= left), None)
        if name is not None:
            room[name] -= sizes[key]
            side[key] = name
    short = {name: left for name, left in room.items() if left}
    if short:
        name, left = next(iter(short.items()))
        raise UserError(
            f"split.rows.{name}: {counts[name]} rows wanted, but {left} are missing "
            f"(the source has {sum(sizes.values())} for {sum(counts.values())}); lower the counts"
        )
    return side
