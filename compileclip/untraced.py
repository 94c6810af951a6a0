"""Steps that compile by themselves are not tried: Dynamo would remember it.

Tried on stand-ins, under a mode that sees each operation, ``torch.compile`` compiles nothing, and
marks the code as not to be compiled, for the real optimizer too. So while a step is tried for the
first time, what is compiled runs as it is written; and such a step is left to itself.

Private to torch and used here, read in torch 2.11 to 2.14: the name of the function that
``torch.compile`` puts around another, and of its file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from compileclip.shadow import NotPointwiseError

_WRAPPER, _FILE = "compile_wrapper", os.path.join("torch", "_dynamo", "eval_frame.py")


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it, what ``torch.compile`` has made runs as it is written.

    Raises:
        NotPointwiseError: something of the kind was called.
    """
    found: list[str] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name == _WRAPPER and code.co_filename.endswith(_FILE):
            found.append(code.co_name)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        sys.setprofile(before)
    if found:
        raise NotPointwiseError("the step compiles by itself: it calls what torch.compile made")
