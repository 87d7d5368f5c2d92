"""Ablation of refusal: fitted edits, sweeps over blocks, damage, robustness, localisation."""
