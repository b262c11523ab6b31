"""Attention backends and kernels: tensors in, tensors out."""
