"""From any optimizer's step to a program: what it does to one parameter, and with which scalars.

In: an optimizer and a few of its parameters. Out: a ``Program`` (``lowering/program.py``), and
functions that find the scalars of later steps. Read ``recorder.py`` first: the step runs once on a
``shadow.py`` of the parameters, and ATen's operations are noted.
"""
