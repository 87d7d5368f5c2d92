"""The model organism: its invented world, language, prompts, weights and recorded measurements."""
