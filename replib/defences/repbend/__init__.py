"""RepBend (arXiv 2504.01550): configuration, presets, batches, loss and objective."""
