"""FX passes over step graphs, imported as ``compileclip.passes``.

Each pass is one file, named as the pass without ``_pass``. ``all_passes`` is their order.
``COMPILECLIP_DISABLE_PASSES=share_norm_pass,...`` in the environment leaves some out; it is read
where a step is planned and where a graph is compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch.fx import Graph

from compileclip.passes.fuse_stock_clip import FuseStockClip
from compileclip.passes.insert_norm_and_scale import InsertNormAndScale
from compileclip.passes.share_norm import ShareNorm

DISABLE = "COMPILECLIP_DISABLE_PASSES"


def all_passes() -> tuple[type[Any], ...]:
    """Every pass in the order that they run.

    Each has a ``name``, and ``runs_on`` says on which graphs: "step" (an optimizer's step, captured
    by Dynamo or recorded), "captured" (whatever Dynamo captured) or "aten" (in Inductor's slot).
    """
    from compileclip.passes.lift_scalars import LiftScalars  # loads sympy, a third of a second

    return (
        InsertNormAndScale,
        LiftScalars,
        FuseStockClip,
        # From here on every norm is one operator.
        ShareNorm,
    )


def disabled_passes() -> frozenset[str]:
    """The names of the passes that the user has turned off.

    Raises:
        ValueError: there is no pass of one of these names.
    """
    text = os.environ.get(DISABLE, "")
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    if names:
        known = [each.name for each in all_passes()]
        unknown = sorted(names.difference(known))
        if unknown:
            raise ValueError(
                f"{DISABLE}={text!r} names no pass with {', '.join(unknown)}; "
                f"the passes are {', '.join(known)}"
            )
    return names


def captured_passes() -> tuple[Callable[[Graph], int], ...]:
    """The passes for a graph that Dynamo captured: each rewrites it and returns how often."""
    return _enabled("captured")


def default_passes() -> tuple[Callable[[Graph], int], ...]:
    """The passes for Inductor's slot, likewise."""
    return _enabled("aten")


def why_not_inserted() -> str | None:
    """Why no norm and scale may be inserted into a step; None if they may."""
    if InsertNormAndScale.name not in disabled_passes():
        return None
    return f"{DISABLE} leaves out {InsertNormAndScale.name}"


def may_be_cached() -> bool:
    """Whether Inductor's caches may keep a graph.

    Not without ``lift_scalars_pass``: they would serve code of one float for another, as
    ``variable_floats`` says.
    """
    return "lift_scalars_pass" not in disabled_passes()


def _enabled(graph: str) -> tuple[Callable[[Graph], int], ...]:
    disabled = disabled_passes()
    return tuple(p() for p in all_passes() if p.runs_on == graph and p.name not in disabled)
