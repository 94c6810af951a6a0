"""Parameters that one program serves with the same scalars, and where their tensors lie.

In: an optimizer's groups and gradients. Out: buckets, and tables of addresses that kernels read,
checked again at each step. Read ``bucket.py`` first; ``grouping.py`` sorts into buckets,
``pointers.py`` gathers addresses, ``bucket_step.py`` learns the scalars of each step.
"""
