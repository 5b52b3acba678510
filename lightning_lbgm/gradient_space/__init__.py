"""Gradient space: Gram matrices and principal directions of the gradients of a run."""
