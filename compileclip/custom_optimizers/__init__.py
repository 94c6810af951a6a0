"""Optimizers whose class is not torch's: may their step be recorded and taken over?

In: an optimizer. Out: nothing, or the reason why it keeps its own step. Read ``checks.py`` first:
what must hold of a step; ``side_effects.py`` reads its code before anything is tried, and
``closure_calls.py`` counts how often it calls a closure.
"""
