"""Generated source as a module."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from compileclip.native.native_build import cache_folder


@functools.cache
def load(text: str) -> ModuleType:
    """The module of a source; Triton reads the file again, so it stays in torch's cache."""
    key = hashlib.sha256(text.encode()).hexdigest()[:40]
    path = cache_folder() / f"{key}.py"
    if not path.exists() or path.read_text() != text:  # the latter: cut short
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="making-") as scratch:
            made = Path(scratch) / path.name
            made.write_text(text)
            with contextlib.suppress(OSError):
                os.replace(made, path)
    spec: Any = importlib.util.spec_from_file_location(f"compileclip_{key}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
