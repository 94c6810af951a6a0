"""Dynamo and Inductor: whole training steps, mode ``inductor``, and the backend ``"compileclip"``.

In: a training step or an optimizer's step. Out: a compiled one, into whose graph the passes of
``compileclip.passes`` have put the norm and the scale. Read ``traced_step.py`` first, which is what
Dynamo sees; ``inductor_passes.py`` is the one file that touches Inductor's slots for passes.
"""
