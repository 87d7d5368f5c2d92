"""Clouds and covariances of known shape, for tests of what is Gaussian."""

import math

import mpmath
import torch


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, seed=9):
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


def conditioned(k, condition, seed=0):
    """A factor F, [3k, k], whose covariance F^T F has the given condition number."""
    left = torch.linalg.qr(normal(3 * k, k, seed=seed))[0]
    deviations = torch.logspace(0, -math.log10(condition) / 2, k, dtype=torch.float64)
    return left * deviations @ rotation(k, seed + 1)


def classes(n=60, m=45, d=12, seed=0):
    """Harmful and harmless clouds with a gap, unlike covariances and one axis that dominates."""
    mix = rotation(d, seed) * torch.logspace(0.5, -1, d, dtype=torch.float64)
    harmful = normal(n, d, seed=seed + 1) @ mix.mT
    harmless = normal(m, d, seed=seed + 2) @ (mix @ torch.diag(torch.linspace(0.5, 2, d, dtype=torch.float64))).mT
    return harmful + 5 * mix[:, 1] + 3, harmless + 3


def massive(n=60, d=400):
    """A gap over a hundred coordinates beside two others of huge variance and equal means."""
    harmful, harmless = normal(n, d), normal(n, d, seed=1)
    harmful[:, 10:110] += 1.5
    for cloud in (harmful, harmless):
        cloud[:, :2] *= 1000
        cloud[:, :2] -= cloud[:, :2].mean(0)
    return harmful, harmless


def relative(a, b):
    return float((a - b).norm() / b.norm())


def covariance(factor):
    return factor.mT @ factor


def textbook_scale(s, t):
    """The symmetric-root formula on covariances, as public code computes it: valid while they are well conditioned."""
    values, vectors = torch.linalg.eigh(s)
    root, inverse = (vectors * values.clamp_min(0) ** p @ vectors.mT for p in (0.5, -0.5))
    middle, axes = torch.linalg.eigh(root @ t @ root)
    return inverse @ (axes * middle.clamp_min(0).sqrt() @ axes.mT) @ inverse


def exact_scale(source, target, digits=60):
    """The same with many digits, from the factors as they are."""
    k = source.shape[1]
    with mpmath.workdps(digits):
        s, t = (mpmath.matrix(f.tolist()).T * mpmath.matrix(f.tolist()) for f in (source, target))
        root = _root(s)
        inverse = mpmath.inverse(root)
        exact = inverse * _root(root * t * root) * inverse
        return torch.tensor([[float(exact[i, j]) for j in range(k)] for i in range(k)], dtype=torch.float64)


def _root(matrix):
    values, vectors = mpmath.eigsy((matrix + matrix.T) / 2)
    return vectors * mpmath.diag([mpmath.sqrt(v) for v in values]) * vectors.T
