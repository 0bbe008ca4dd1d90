"""Triton kernels of fastpost (import name fastpost.kernels). They need torch and triton, and nothing of fastpost."""
