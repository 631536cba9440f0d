"""Kernels for NVIDIA GPUs: Triton programs compiled ahead of time, and how they are launched without Triton."""
