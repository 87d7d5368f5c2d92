"""Measures of activations: geometry, divergence, probes, logit lens."""

from replib.analysis.divergence import js_divergence
from replib.analysis.geometry import pairwise_distance, pca
from replib.analysis.logit_lens import compare, logit_lens
from replib.analysis.profile import layer_profile

__all__ = ["compare", "js_divergence", "layer_profile", "logit_lens", "pairwise_distance", "pca"]
