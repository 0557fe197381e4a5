"""The PPO mathematics a second time: plain Python, float64, loops, no torch.

Written from the papers and not from `rlhf/`, and wherever possible in another form (sums instead of recursions, cases
instead of min and max), so that the same mistake is unlikely to be made twice. Below, the random inputs that the
property tests share.
"""

import math
from dataclasses import dataclass

from hypothesis import strategies as st

Row = list[float]
Grid = list[Row]
Mask = list[list[bool]]


def cells(mask: Mask) -> list[tuple[int, int]]:
    """Coordinates of the entries that count."""
    return [(b, t) for b, row in enumerate(mask) for t, counts in enumerate(row) if counts]


def zeros(mask: Mask) -> Grid:
    return [[0.0] * len(row) for row in mask]


# ---------------------------------------------------------------------------------------------------- statistics
def mean(x: Grid, mask: Mask) -> float:
    picked = [x[b][t] for b, t in cells(mask)]
    return math.fsum(picked) / len(picked) if picked else 0.0


def variance(x: Grid, mask: Mask) -> float:
    """Biased, as half the mean squared difference over all pairs: needs no mean."""
    picked = [x[b][t] for b, t in cells(mask)]
    if not picked:
        return 0.0
    return math.fsum((a - c) ** 2 for a in picked for c in picked) / (2 * len(picked) ** 2)


def whiten(x: Grid, mask: Mask, shift_mean: bool, moments: tuple[float, float] | None = None) -> Grid:
    centre, var = moments if moments is not None else (mean(x, mask), variance(x, mask))
    out = zeros(mask)
    for b, t in cells(mask):
        out[b][t] = (x[b][t] - centre) / math.sqrt(var + 1e-8) + (0.0 if shift_mean else centre)
    return out


# ---------------------------------------------------------------------------------------------------- advantages
def affine_fit(x: Grid, y: Grid, mask: Mask, least: float = 0.0) -> tuple[float, float]:
    """The scale (at least `least`) and offset with the smallest sum over rows of their mean square."""
    rows = [[t for t, counts in enumerate(row) if counts] for row in mask]
    some = [(b, t, 1 / len(row)) for b, row in enumerate(rows) for t in row]
    total = sum(weight for *_, weight in some) or 1.0
    mean_x, mean_y = (sum(z[b][t] * weight for b, t, weight in some) / total for z in (x, y))
    products = sum((x[b][t] - mean_x) * (y[b][t] - mean_y) * weight for b, t, weight in some)
    squares = sum((x[b][t] - mean_x) ** 2 * weight for b, t, weight in some)
    scale = max(least, products / squares if squares else 0.0)
    return scale, mean_y - scale * mean_x


def kl_penalty(logprobs: Grid, ref_logprobs: Grid, estimator: str) -> Grid:
    def one(p: float, q: float) -> float:
        if estimator == "k1":
            return p - q
        if estimator == "k2":
            return (p - q) ** 2 / 2
        ratio = math.exp(q - p)
        return ratio - 1 + p - q

    return [[one(p, q) for p, q in zip(*rows, strict=True)] for rows in zip(logprobs, ref_logprobs, strict=True)]


def token_rewards(scores: Row, kl: Grid, mask: Mask, kl_coef: float) -> Grid:
    out = zeros(mask)
    for b, t in cells(mask):
        out[b][t] = 0.0 - kl_coef * kl[b][t]
        if not any(mask[b][t + 1 :]):
            out[b][t] += scores[b]
    return out


def gae(rewards: Grid, values: Grid, mask: Mask, gamma: float, lam: float) -> tuple[Grid, Grid]:
    """Eq. 14-16 of Schulman et al. 2016 read from left to right: a lambda-weighted mixture of n-step returns."""
    advantages, returns = zeros(mask), zeros(mask)
    for b, t in cells(mask):
        length = sum(mask[b])
        n_step = []  # n_step[n - 1] = r_t + gamma r_{t+1} + ... + gamma^{n-1} r_{t+n-1} + gamma^n V_{t+n}
        discounted = 0.0
        for n in range(1, length - t + 1):
            discounted += gamma ** (n - 1) * rewards[b][t + n - 1]
            bootstrap = gamma**n * values[b][t + n] if t + n < length else 0.0
            n_step.append(discounted + bootstrap)
        longest = len(n_step)
        lambda_return = math.fsum((1 - lam) * lam ** (n - 1) * n_step[n - 1] for n in range(1, longest))
        returns[b][t] = lambda_return + lam ** (longest - 1) * n_step[-1]
        advantages[b][t] = returns[b][t] - values[b][t]
    return advantages, returns


# -------------------------------------------------------------------------------------------------------- losses
@dataclass
class Loss:
    loss: float
    clipfrac: float
    gradient: Grid  # with respect to the new log-probabilities, or the new values
    approxkl: float = 0.0


def policy_loss(
    new_logprobs: Grid, logprobs: Grid, advantages: Grid, mask: Mask, cliprange: float, denominator: float | None = None
) -> Loss:
    """By cases: a token is frozen once its ratio has left the clip range in the direction its advantage asks for."""
    count = denominator if denominator is not None else max(len(cells(mask)), 1)
    out = Loss(0.0, 0.0, zeros(mask))
    for b, t in cells(mask):
        log_ratio, advantage = new_logprobs[b][t] - logprobs[b][t], advantages[b][t]
        ratio = math.exp(log_ratio)
        if advantage > 0 and ratio > 1 + cliprange:
            gain, slope, frozen = advantage * (1 + cliprange), 0.0, 1.0
        elif advantage < 0 and ratio < 1 - cliprange:
            gain, slope, frozen = advantage * (1 - cliprange), 0.0, 1.0
        else:
            gain, slope, frozen = advantage * ratio, advantage * ratio, 0.0  # d ratio / d new_logprob = ratio
        out.loss -= gain / count
        out.gradient[b][t] = 0.0 - slope / count
        out.clipfrac += frozen / count
        out.approxkl += log_ratio**2 / 2 / count
    return out


def value_loss(
    new_values: Grid,
    values: Grid,
    returns: Grid,
    mask: Mask,
    cliprange_value: float | None,
    denominator: float | None = None,
) -> Loss:
    """By cases: outside the trusted range the nearer bound stands in for the value, but only if it is the worse one."""
    count = denominator if denominator is not None else max(len(cells(mask)), 1)
    out = Loss(0.0, 0.0, zeros(mask))
    for b, t in cells(mask):
        value, target = new_values[b][t], returns[b][t]
        bound = value
        if cliprange_value is not None and value > values[b][t] + cliprange_value:
            bound = values[b][t] + cliprange_value
        if cliprange_value is not None and value < values[b][t] - cliprange_value:
            bound = values[b][t] - cliprange_value
        frozen = abs(bound - target) > abs(value - target)
        out.loss += ((bound if frozen else value) - target) ** 2 / 2 / count
        out.gradient[b][t] = 0.0 if frozen else (value - target) / count
        out.clipfrac += float(frozen) / count
    return out


def pairwise_loss(chosen: Row, rejected: Row, margins: Row) -> float:
    """-log P(chosen preferred), P = e^a / (e^a + e^b), written so that no exponential overflows."""
    total = 0.0
    for c, r, m in zip(chosen, rejected, margins, strict=True):
        lead = c - r - m
        total += math.log1p(math.exp(-abs(lead))) + max(-lead, 0.0)
    return total / len(chosen)


# ------------------------------------------------------------------------------------------------- random inputs
def floats(limit: float) -> st.SearchStrategy[float]:
    """Numbers that float32 holds exactly, so that it and the float64 reference see the same; subnormals vanish."""
    return st.floats(-limit, limit, width=32, allow_subnormal=False)


@st.composite
def ragged(draw: st.DrawFn, *limits: float, min_length: int = 1) -> tuple[Mask, list[Grid]]:
    """A right-padded bool mask [B,R] with row lengths min_length..R, and one [B,R] grid per limit."""
    batch, width = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(min_length, width), min_size=batch, max_size=batch))
    mask = [[t < length for t in range(width)] for length in lengths]
    row = {limit: st.lists(floats(limit), min_size=width, max_size=width) for limit in limits}
    return mask, [draw(st.lists(row[limit], min_size=batch, max_size=batch)) for limit in limits]


@st.composite
def scattered(draw: st.DrawFn, limit: float) -> tuple[Mask, Grid]:
    """Any bool mask, holes and all-False rows included, and one grid."""
    batch, width = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    mask = draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=batch, max_size=batch))
    grid = st.lists(st.lists(floats(limit), min_size=width, max_size=width), min_size=batch, max_size=batch)
    return mask, draw(grid)
