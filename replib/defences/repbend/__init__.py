"""RepBend (arXiv 2504.01550): configuration, presets, batches, loss and objective."""

from replib.defences.repbend.config import BendConfig
from replib.defences.repbend.objective import RepBend

__all__ = ["BendConfig", "RepBend"]
