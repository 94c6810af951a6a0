"""Programs, norms and scales as Triton kernels for a GPU.

In: a ``Program``, or a list of tensors. Out: kernels that update all tensors of a bucket in one
launch. Read ``triton_kernel.py`` first, then ``triton_source.py``; ``triton_ops.py`` has a line for
each ATen operation.
"""
