"""Defences as training objectives, one file a method, with the values of their papers."""

from replib.defences.catalogue import DEFENCES, baseline, train_baseline
from replib.defences.hardening import Hardened, Hardening
from replib.defences.repbend import BendConfig, RepBend

__all__ = ["DEFENCES", "BendConfig", "Hardened", "Hardening", "RepBend", "baseline", "train_baseline"]
