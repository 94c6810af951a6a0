"""C++ that reads torch's tensors and calls CUDA's driver, and its compilation.

In: C++ source, Python's objects, addresses. Out: one library of functions (``native_tensors.py``),
and a table of the driver's (``cuda_driver.py``). Read ``native_build.py`` first.
"""
