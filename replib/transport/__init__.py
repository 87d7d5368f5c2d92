"""Gaussian optimal transport and affine maps of arrays, without any model."""
