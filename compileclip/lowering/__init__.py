"""Kernels that step graphs become: C++ on a CPU, Triton on a GPU."""
