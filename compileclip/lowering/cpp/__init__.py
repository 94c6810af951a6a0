"""Programs, norms and scales as C++ for a CPU's threads.

In: a ``Program``, or a list of tensors. Out: functions of a shared library, compiled once per
machine. Read ``cpp_kernel.py`` first; ``cpp_ops.py`` has a line for each ATen operation.
"""
