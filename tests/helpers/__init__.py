"""What several tests share."""

import os
from pathlib import Path

WITH_HELPERS = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
}
"""Environment in which ``python -m helpers.<name>`` runs."""
