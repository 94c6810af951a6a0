"""Kernels that step graphs become: C++ on a CPU, Triton on a GPU."""


class UnsupportedError(ValueError):
    """A program holds an operation or a dtype that a lowering has no code for."""


# Elements that a CPU kernel takes at a time: partial sums and shares of the work are in chunks.
CHUNK = 16384
