"""Mode ``eager`` and the drop-in functions: the semantics of clipping, in plain PyTorch.

In: an optimizer, its gradients, ``ClipSettings``. Out: the total norm, and parameters stepped by
torch's own kernels. Read ``reference.py`` first, against which all else in the project is measured,
then ``eager_step.py``, which hands the clip coefficient to the optimizer's own step.
"""
