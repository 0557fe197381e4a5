"""Cut a mini-batch into micro-batches that fit a token budget.

Pure Python: lengths in, row indices out. Every rank computes the same plan from the same lengths and takes its own
part, so no plan has to be exchanged. The losses do not depend on it (they divide by the token count of the mini-batch).
"""

from collections.abc import Sequence


def plan_micro_batches(
    lengths: Sequence[int], max_tokens: int, num_ranks: int, prompt_lengths: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Spread rows over ranks, balanced by tokens, and pack each rank's rows into micro-batches.

    Rows of like length go together, so that padding stays small. Every rank gets the same number of micro-batches,
    because the collectives of FSDP must match; where a rank has too few rows for that, some of its micro-batches are
    empty and the caller runs a dummy forward and backward for them. Longest first: a budget that is too large for the
    device fails at once and not after an hour.

    Args:
        lengths: tokens of each row (prompt and response, without padding); >= 1.
        max_tokens: largest padded area of a micro-batch: its rows times the longest prompt plus the longest response.
            A row that is longer than that gets a micro-batch of its own.
        num_ranks: number of processes; >= 1.
        prompt_lengths: the prompt's part of each row; None = 0.

    Returns:
        plan[rank][micro_batch] = row indices, longest first. Every row appears exactly once. The token sums of any
        two ranks differ by no more than the longest row. The same input always gives the same plan.

    Raises:
        ValueError: a budget, a number of ranks or a length below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; set ppo.max_tokens_per_micro_batch to at least 1")
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; there is at least one process")
    lengths = [int(length) for length in lengths]  # numpy's small integers would overflow in rows * longest
    for row, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"lengths[{row}] is {length}; a row holds at least one token")

    prompts = [0] * len(lengths) if prompt_lengths is None else [int(length) for length in prompt_lengths]
    plans = [_pack(rows, lengths, prompts, max_tokens) for rows in _spread(lengths, num_ranks)]
    n_micro_batches = max(len(plan) for plan in plans)
    for plan in plans:
        _stretch(plan, lengths, n_micro_batches)
    return plans


def _spread(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Longest row first, each to the rank with the fewest tokens so far (Graham 1969, LPT)."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        rank = tokens.index(min(tokens))
        ranks[rank].append(row)
        tokens[rank] += lengths[row]
    return ranks


def _pack(rows: list[int], lengths: Sequence[int], prompts: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Fill one micro-batch after the other; rows come longest first.

    A batch is as wide as its longest prompt and its longest response, which may be those of two rows.
    """
    micro_batches: list[list[int]] = []
    prompt = response = 0
    for row in rows:
        wider = max(prompt, prompts[row]), max(response, lengths[row] - prompts[row])
        if micro_batches and (len(micro_batches[-1]) + 1) * sum(wider) <= max_tokens:
            micro_batches[-1].append(row)
            prompt, response = wider
        else:
            micro_batches.append([row])
            prompt, response = prompts[row], lengths[row] - prompts[row]
    return micro_batches


def _stretch(micro_batches: list[list[int]], lengths: Sequence[int], count: int) -> None:
    """Bring a rank up to `count` micro-batches: halve the largest while it has two rows, then add empty ones.

    Halving first, because a dummy pass costs as much time as a real one and does no work.
    """
    while len(micro_batches) < count:
        divisible = [i for i, rows in enumerate(micro_batches) if len(rows) > 1]
        if not divisible:
            micro_batches.append([])
            continue
        largest = max(divisible, key=lambda i: len(micro_batches[i]) * lengths[micro_batches[i][0]])
        rows = micro_batches[largest]
        half = (len(rows) + 1) // 2
        micro_batches[largest : largest + 1] = [rows[:half], rows[half:]]
