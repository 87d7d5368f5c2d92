"""Edits of activations: methods that fit them, contexts that apply them, null controls."""
