"""Measurements made beforehand are found by the program that packs them."""

import pytest

from replib.core.errors import ReplibError
from replib.experiments.comparison_results import DefenceComparison, HardeningResults
from replib.experiments.response_surface import CoefficientSweep
from replib.experiments.transport_results import TransportAudit

PROGRAMS = {
    "surface": CoefficientSweep,
    "comparison": DefenceComparison,
    "hardening": HardeningResults,
    "defended": TransportAudit,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_missing_file_says_which_program_makes_it(program, tmp_path, monkeypatch):
    (tmp_path / "organism").mkdir()
    monkeypatch.setenv("REPLIB_DATA", str(tmp_path))
    with pytest.raises(ReplibError, match=rf"{program}\.json: run python -m replib\.organism\.{program} first"):
        PROGRAMS[program].load()
    with pytest.raises(ReplibError, match=r"none\.json: run python -m"):
        PROGRAMS[program].load(tmp_path / "none.json")
