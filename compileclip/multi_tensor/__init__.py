"""Mode ``multi_tensor``: one norm and one kernel for each kind of parameters, at each step.

In: an optimizer and its gradients. Out: the total norm, and parameters stepped by compiled kernels;
or the reason why not (``eligibility.py``). Read ``multi_tensor_step.py`` first; a step like the one
before it takes the short way of ``native_step.py``.
"""
