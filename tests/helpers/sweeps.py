"""Prompts of a small sweep."""

from replib.ablation.fit import AblationData
from replib.data.prompts import Prompt

HARMFUL = [f"w{i} w{i + 1} w{i + 2}" for i in range(0, 20)]
HARMLESS = [f"w{i} w{(2 * i) % 40}" for i in range(20, 38)]
DATA = AblationData(HARMFUL, HARMLESS, [Prompt("w39 w38", "harmful"), Prompt("w37 w36", "harmful")], ["w1 w39", "w2"])
