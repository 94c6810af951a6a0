"""Steps that give a warning are not tried: it would be given for the trial, and too often.

What torch warns of once in a process it would not warn of again, and Python shows most warnings
once for each place that gives them. So while a step is tried, a warning in its thread is an error
before anybody has noted that it was given, and torch warns of everything.

``warnings.filters`` is the list that Python looks at, and its first entry that fits counts; it is
changed in place, and not by ``simplefilter``, after which each warning would be shown anew.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from compileclip.recording.shadow import NotPointwiseError


class _OfThisThread(type):
    """Of a class that each warning is taken to be of, in the thread that made the class."""

    def __init__(cls, *args: Any) -> None:
        super().__init__(*args)
        cls.found: list[str] = []
        cls._thread = threading.get_ident()

    def __subclasscheck__(cls, category: type) -> bool:
        if threading.get_ident() != cls._thread:
            return False
        cls.found.append(category.__name__)
        return True


@contextmanager
def unwarned() -> Iterator[None]:
    """Within it, nobody may give a warning that would be seen.

    Raises:
        NotPointwiseError: somebody did.
    """
    cls = _OfThisThread("Any", (Warning,), {})
    entry: Any = ("error", None, cls, None, 0)
    always = torch.is_warn_always_enabled()
    filters: Any = warnings.filters
    filters.insert(0, entry)
    torch.set_warn_always(True)
    try:
        yield
    except Exception:
        if not cls.found:
            raise
    finally:
        torch.set_warn_always(always)
        filters.remove(entry)
    if cls.found:
        raise NotPointwiseError(f"the step gives a {cls.found[0]}")
