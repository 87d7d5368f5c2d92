"""Programs whose results are recorded in data/organism, and the readers of these results."""
