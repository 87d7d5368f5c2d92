"""Gaussian optimal transport and affine maps of arrays; no model is known here."""

from replib.transport.affine import AffineEdit
from replib.transport.bures_wasserstein import bures_wasserstein, bures_wasserstein_debiased, bures_wasserstein_null
from replib.transport.gaussian_map import GaussianMap
from replib.transport.gaussians import Gaussian, Moments

__all__ = [
    "AffineEdit",
    "Gaussian",
    "GaussianMap",
    "Moments",
    "bures_wasserstein",
    "bures_wasserstein_debiased",
    "bures_wasserstein_null",
]
