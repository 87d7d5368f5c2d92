"""Training of an adapter by any objective: configuration, trainer, checkpoints, model selection."""
