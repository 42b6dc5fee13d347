"""Checkpoints: reading files, published layouts <-> ours, and what became of every weight."""

from efficient_detr.checkpoint.conversion import convert_keys

__all__ = ["convert_keys"]
