"""Training of an adapter by any objective: configuration, trainer, checkpoints, model selection."""

from replib.training.config import TrainConfig
from replib.training.objective import Objective
from replib.training.result import TrainResult
from replib.training.train import train

__all__ = ["Objective", "TrainConfig", "TrainResult", "train"]
