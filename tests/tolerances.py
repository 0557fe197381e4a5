"""The one tolerance helper. A test that needs looser numbers than these explains itself by passing them."""

from typing import Any

import torch

MAX_RTOL = 1e-2  # anything looser would pass a wrong sign or a wrong constant
# (rtol, atol) by the dtype that was computed in: a few hundred roundings of it
TOLERANCES = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (2e-5, 1e-6),
    torch.float16: (5e-3, 1e-3),
    torch.bfloat16: (1e-2, 1e-2),
}


def assert_close(actual: Any, expected: Any, rtol: float | None = None, atol: float | None = None) -> None:
    """Assert equal shapes and |actual - expected| <= atol + rtol * |expected|, compared in float64.

    The coarser dtype of the two decides the tolerance; typed-in numbers are exact, so beside them the tensor's does.
    NaN equals nothing; equal infinities are equal.

    Args:
        actual: tensor, or anything `torch.as_tensor` takes (Python floats count as float64).
        expected: the same; nested lists of typed-in numbers are usual.
        rtol: overrides the default; never above 1e-2.
        atol: overrides the default.
    """
    tensors = [value for value in (actual, expected) if isinstance(value, torch.Tensor)]
    dtypes = [tensor.dtype for tensor in tensors if tensor.dtype in TOLERANCES] or [torch.float64]
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    rtol = TOLERANCES[coarsest][0] if rtol is None else rtol
    atol = TOLERANCES[coarsest][1] if atol is None else atol
    assert rtol <= MAX_RTOL, f"rtol {rtol} would hide a real error"
    actual, expected = _float64(actual), _float64(expected)
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    near = (actual - expected).abs() <= atol + rtol * expected.abs()
    same = (actual == expected) | (near & expected.isfinite())  # anything is "near" an infinity
    assert bool(same.all()), f"rtol {rtol}, atol {atol}\nactual:   {actual.tolist()}\nexpected: {expected.tolist()}"


def _float64(value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu()
