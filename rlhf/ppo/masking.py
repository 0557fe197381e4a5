"""Statistics over the entries that count.

One polarity everywhere: a mask is bool and True means "this entry counts". An entry whose mask is False may hold
anything, NaN and inf included: it reaches neither a value nor a gradient. That is why every function selects with
`torch.where` *before* it computes; multiplying by the mask would turn NaN * 0 into NaN.
"""

import torch
from torch import Tensor

WHITEN_EPS = 1e-8  # Huang et al. 2024, detail "whitening"; also in OpenAI's 2019 code


def check_mask(mask: Tensor, **tensors: Tensor) -> None:
    """Refuse a mask that is not bool, and tensors that do not have the mask's shape.

    A float mask hides its polarity, and a shape that merely broadcasts ([B,1] beside [B,R]) gives a wrong number
    instead of an error.

    Args:
        mask: bool, True = counts.
        **tensors: what the mask is applied to, by the name the caller knows it by.

    Raises:
        ValueError: naming the argument, what was seen and what to do.
    """
    if mask.dtype is not torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; pass a bool mask where True means the entry counts")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} but mask has {list(mask.shape)}; give both the same shape"
            )


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of `x` over the entries that count.

    Where nothing counts the mean is 0, with gradient 0: an empty micro-batch then adds nothing to a sum, while a NaN
    would spread to every rank.

    Args:
        x: any shape.
        mask: bool, the shape of `x`, True = counts.
        dim: dimension(s) to average over; None averages over all.

    Returns:
        The mean, in the dtype of `x`, with the dimensions in `dim` removed.

    Raises:
        ValueError: the mask is not bool or has another shape.
    """
    check_mask(mask, x=x)
    x = torch.where(mask, x, 0)
    count = mask.sum(dim=dim).clamp(min=1)
    return x.sum(dim=dim) / count


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of the entries that count.

    The variance divides by n, not n - 1, as OpenAI's code and Huang et al. 2024 do (TRL divides by n - 1): it is
    defined for a single token, and whitened data then have a mean square of exactly 1. Two passes, and a mean that
    is refined once, so that a large offset does not swamp a small spread (E[x^2] - E[x]^2 would cancel).

    Args:
        x: any shape.
        mask: bool, the shape of `x`, True = counts.

    Returns:
        mean, var: scalars in the dtype of `x`; both 0 where nothing counts.
        count: int64 scalar.

    Raises:
        ValueError: the mask is not bool or has another shape.
    """
    mean = masked_mean(x, mask)
    # The rounding error of one pass matters: whitening divides by sqrt(var + 1e-8), which for constant data
    # multiplies that error by 10,000. After this line constant data have deviation 0 exactly.
    mean = mean + masked_mean(x - mean, mask)
    deviation = torch.where(mask, x, mean) - mean
    var = masked_mean(deviation.square(), mask)  # var = sum_i (x_i - mean)^2 / n
    return mean, var, mask.sum()


def merge_moments(means: Tensor, variances: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the union of N disjoint parts (micro-batches, ranks) from the moments of the parts.

    Whitening per rank would make 1 GPU and N GPUs different runs of the same batch. Each rank calls `masked_moments`,
    the three numbers are gathered, and this gives the global statistics that `masked_whiten` takes.

    Args:
        means: [N], means of the parts.
        variances: [N], biased variances of the parts.
        counts: [N], integers; a part with count 0 is ignored.

    Returns:
        mean, var: scalars in the dtype of `means`; both 0 where every part is empty.
        count: scalar, the dtype of `counts`.

    Source:
        Chan, Golub & LeVeque 1979, *Updating Formulae and a Pairwise Algorithm for Computing Sample Variances*.
    """
    total = counts.sum()
    weight = counts.to(means.dtype) / total.clamp(min=1)
    # Relative to the largest part, so that parts of equal mean merge without rounding error.
    pivot = means[counts.argmax()]
    means = torch.where(counts > 0, means, pivot)
    mean = pivot + (weight * (means - pivot)).sum()
    # var = sum_k n_k / n (var_k + (mean_k - mean)^2)
    spread = torch.where(counts > 0, variances, 0) + (means - mean).square()
    return mean, (weight * spread).sum(), total


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    shift_mean: bool = True,
    moments: tuple[Tensor | float, Tensor | float] | None = None,
) -> Tensor:
    """Scale `x` to unit variance over the entries that count, and shift it to mean 0.

    Args:
        x: any shape.
        mask: bool, the shape of `x`, True = counts.
        shift_mean: True for advantages; False keeps the mean (rewards, whose mean carries meaning).
        moments: (mean, biased variance) of the global batch, from `merge_moments`; None takes those of `x` itself.

    Returns:
        (x - mean) / sqrt(var + 1e-8), plus the mean if not `shift_mean`; 0 where the mask is False. The dtype of `x`.

    Raises:
        ValueError: the mask is not bool or has another shape.

    Source:
        Ziegler et al. 2019 (code); Huang et al. 2024, *The N+ Implementation Details of RLHF with PPO*.
    """
    check_mask(mask, x=x)
    mean, var = masked_moments(x, mask)[:2] if moments is None else moments
    var = torch.as_tensor(var, dtype=x.dtype, device=x.device)
    x = torch.where(mask, x, 0)  # before the product: the gradient of var would meet a masked NaN there
    whitened = (x - mean) * torch.rsqrt(var + WHITEN_EPS)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0)


def affine_fit(x: Tensor, y: Tensor, mask: Tensor, least: float = 0.0) -> tuple[float, float]:
    """Scale and offset that bring `x` closest to `y` (least squares) where it counts, with a scale of at least `least`.

    Every row counts the same, however many of its entries do: a response has one end, whatever its length. A negative
    scale would turn `x` upside down for the sake of noise. Whatever the scale, `y`'s mean is met.

    Args:
        x, y: [B,R].
        mask: bool, their shape, True = counts.
        least: smallest scale, also where `x` is constant or nothing counts; 0 or more.

    Returns:
        scale, offset: of y ~ scale * x + offset. NaN where a counting entry is not finite.

    Raises:
        ValueError: the mask is not bool or has another shape.
    """
    check_mask(mask, x=x, y=y)
    x, y = (torch.where(mask, z, 0).double() for z in (x, y))
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1).double()
    weight = weight / weight.sum().clamp(min=1)
    mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
    variance = (weight * (x - mean_x) ** 2).sum()
    if variance <= (1e-12 * mean_x) ** 2:  # a constant, whose mean is off by rounding
        variance = torch.zeros_like(variance)
    covariance = (weight * (x - mean_x) * (y - mean_y)).sum()
    slope = covariance / variance if variance != 0 else variance
    scale = float(slope.clamp(min=least))
    return scale, float(mean_y) - scale * float(mean_x)
