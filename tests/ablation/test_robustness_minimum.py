"""The least strength that flips a prompt, and the share of prompts that hold."""

import numpy as np
import pytest
import torch

from replib.ablation.robustness import STRENGTHS, holding, least_strengths, scaled
from replib.core.errors import ReplibError
from replib.core.stats import wilson
from replib.transport.affine import AffineEdit


def test_each_prompt_has_the_first_strength_that_flips_it():
    strengths = 0.0, 0.2, 0.4, 0.5, 1.0
    bounds = (0.0, 9), (0.35, 9), (0.5, 0.6), (5.0, 9)  # complied with between the two; the third refuses again
    complied = np.array([[a <= s <= b for a, b in bounds] for s in strengths])
    assert least_strengths(complied, strengths).tolist() == [0.0, 0.4, 0.5, np.inf]


def test_scaling_moves_every_activation_that_share_of_the_way():
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    edit = AffineEdit(torch.randn(2, 1), torch.randn(2, 1), torch.randn(2))
    found = scaled({"response": {("resid_post", 1): edit}}, (0.0, 0.5, 1.0, 2.0))
    for some, share in zip(found, (0.0, 0.5, 1.0, 2.0), strict=True):
        torch.testing.assert_close(some["response"]["resid_post", 1](x), x + share * (edit(x) - x))


def test_the_share_that_holds_falls_with_strength_and_its_interval_holds_it():
    least = np.random.default_rng(0).choice([*STRENGTHS[1:], np.inf], (5, 40))
    table = holding(least)
    assert table.value.is_monotonic_decreasing and table.value.iloc[0] == 1
    assert (table.low <= table.value).all() and (table.value <= table.high).all()
    assert table.value.iloc[-1] == np.isinf(least).mean() and (table.n == 200).all()
    assert tuple(holding(np.full((3, 20), np.inf)).iloc[-1][["low", "high"]]) == wilson(20, 20)


@pytest.mark.parametrize("strengths", [(), (0.2, 0.2), (0.5, 0.1), (-0.1, 1.0)])
def test_strengths_must_rise(strengths):
    with pytest.raises(ReplibError, match="must rise"):
        scaled({}, strengths)
