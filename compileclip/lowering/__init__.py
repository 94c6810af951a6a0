"""Kernels that step graphs become: C++ on a CPU, Triton on a GPU."""

CHUNK = 16384  # elements that one turn of a CPU thread works through; the norm splits alike


class UnsupportedError(ValueError):
    """A program holds an operation or a dtype that a lowering has no code for."""
