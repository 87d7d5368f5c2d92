"""Programs whose results are recorded in data/organism, and the readers of these results."""

from replib.experiments.comparison_results import DefenceComparison
from replib.experiments.hardening_results import HardeningResults
from replib.experiments.response_surface import CoefficientSweep, ResponseSurface
from replib.experiments.transport_results import TransportAudit

__all__ = ["CoefficientSweep", "DefenceComparison", "HardeningResults", "ResponseSurface", "TransportAudit"]
