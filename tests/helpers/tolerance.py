"""Tolerances derived from the arithmetic, so that they hold on every processor.

Kernels add in an order of their own, which may also differ with the shape of a batch. Each addition rounds by half an
epsilon of the scale, so two routes through ``depth`` additions one after another differ by ``depth`` epsilons at most.
"""

import torch

from helpers import tiny

_SIZES = tiny.GROUPED | {"blocks": tiny.COMMON["num_hidden_layers"]}
# Sums over the width for queries and keys, for attention, for its output and into the MLP; one over the inner width.
FORWARD = _SIZES["blocks"] * (4 * _SIZES["hidden_size"] + _SIZES["intermediate_size"])
GRADIENT = 3 * FORWARD  # the backward pass has two products for each of the forward pass


def allowed(expected, *, depth=FORWARD, scale=None):
    """Largest difference that rounding explains; the scale is that of each row, along the last axis."""
    if scale is None:
        scale = expected.abs().amax(-1, keepdim=True) if expected.ndim else expected.abs()
    return depth * torch.finfo(expected.dtype).eps * scale


def close(actual, expected, *, depth=FORWARD, scale=None):
    """Assert that two routes agree to rounding: shape, dtype and, row by row, the values."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    difference, most = (actual - expected).abs(), allowed(expected, depth=depth, scale=scale)
    assert (difference <= most).all(), f"off by {difference.max():.1e}; {depth} roundings explain {most.max():.1e}"
