"""Parameters of which each rank holds a part: one norm for all, and steps on the local parts.

In: parameters and gradients, ``DTensor`` or plain, and process groups. Out: the total norm, with
the same bits on every rank, and an optimizer of plain local tensors, which kernels can step.
Read ``total_norm.py`` first, then ``local_optimizer.py``.
"""
