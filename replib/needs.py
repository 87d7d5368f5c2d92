"""What a defence must be given: lists that are filled, coefficients that are numbers, blocks that exist."""

from __future__ import annotations


def block_at(blocks_of_32: int, depth: int) -> int:
    """The block whose output lies as deep in a model as that of so many blocks does in one of 32."""
    return max(0, round(blocks_of_32 / 32 * depth) - 1)
