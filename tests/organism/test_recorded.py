"""A recorded measurement that is missing names the program that writes it."""

from importlib.util import find_spec

import pytest

from replib.core.errors import ReplibError
from replib.experiments import CoefficientSweep, DefenceComparison, HardeningResults, TransportAudit

READERS = {
    "coefficients": CoefficientSweep,
    "comparison": DefenceComparison,
    "hardening": HardeningResults,
    "transport_audit": TransportAudit,
}


@pytest.mark.parametrize("program", READERS)
def test_a_missing_file_says_which_program_writes_it(program, tmp_path, monkeypatch):
    (tmp_path / "organism").mkdir()
    monkeypatch.setenv("REPLIB_DATA", str(tmp_path))
    with pytest.raises(
        ReplibError, match=rf"{program}\.json does not exist: run python -m replib\.experiments\.{program},"
    ):
        READERS[program].load()
    with pytest.raises(ReplibError, match=r"none\.json does not exist: run python -m"):
        READERS[program].load(tmp_path / "none.json")


@pytest.mark.parametrize("program", READERS)
def test_the_program_of_a_recorded_file_exists(program):
    assert find_spec(f"replib.experiments.{program}")
