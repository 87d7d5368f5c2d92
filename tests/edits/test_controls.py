"""An edit beside its nulls: what each is, and the differences with their intervals."""

import numpy as np
import pytest
import torch

from replib.core.stats import two_way_interval, two_way_rate_interval
from replib.edits.controls import CONTROLS, FULL, attributed, variants
from replib.edits.methods import pca_ot


def test_every_control_is_there_and_those_of_chance_are_drawn_anew():
    fits = variants(pca_ot, draws=3)
    assert set(fits) == {FULL, *CONTROLS}
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=g).double(), torch.randn(30, 5, generator=g).double() + 2
    edits = {name: [fit(x, y, 2) for fit in some] for name, some in fits.items()}
    whole, mean, spread = (edits[name][0].displacement(x) for name in (FULL, "mean_only", "covariance_only"))
    torch.testing.assert_close(mean + spread, whole, atol=1e-5, rtol=1e-5)
    for name in ("random_subspace", "random_labels", "harmless_split"):
        first, second, third = (edit.displacement(x) for edit in edits[name])
        assert not torch.allclose(first, second) and not torch.allclose(second, third)


def test_differences_are_to_the_full_edit_on_the_same_prompts():
    rng = np.random.default_rng(0)
    rates = {FULL: rng.integers(0, 2, (4, 30)) * 1.0, "mean_only": rng.integers(0, 2, (4, 30)) * 1.0}
    table = attributed(rates).set_index("variant")
    assert tuple(table.loc[FULL, ["less", "less_low", "less_high"]]) == (0, 0, 0)
    row = table.loc["mean_only"]
    assert row.less == pytest.approx(table.value[FULL] - row.value)
    assert (row.less_low, row.less_high) == two_way_interval(rates[FULL] - rates["mean_only"])
    assert (row.low, row.high) == two_way_rate_interval(rates["mean_only"]) and row.n == 120
