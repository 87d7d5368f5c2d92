"""Activations of prompts: capture, batched reading, storage on disk, remote capture."""
