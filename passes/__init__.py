"""FX passes over step graphs, imported as ``compileclip.passes``.

Each pass is one file. ``default_passes`` is the order of those that Inductor runs on ATen graphs.
Two run earlier, on the graph that Dynamo captured: ``insert_norm_and_scale`` on that of a step,
then ``lift_scalars`` on any.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph

from compileclip.passes.fuse_stock_clip import FuseStockClip
from compileclip.passes.share_norm import ShareNorm


def default_passes() -> tuple[Callable[[Graph], int], ...]:
    """The passes in the order that they run: each rewrites a graph and returns how often."""
    return (
        FuseStockClip(),
        # From here on every norm is one operator.
        ShareNorm(),
    )
