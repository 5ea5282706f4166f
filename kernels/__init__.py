"""Triton kernels, one module per family; also run by Triton's interpreter on the CPU."""
