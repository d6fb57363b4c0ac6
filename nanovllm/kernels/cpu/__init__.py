"""Kernels for the CPU, compiled by numba at their first use."""
