"""Prompts, dialogues and contrasts: files, public sets, splits and training mixtures."""
