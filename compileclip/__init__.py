"""Gradient clipping by total norm as part of the optimizer's step.

>>> opt = compileclip.wrap(torch.optim.AdamW(model.parameters(), lr=3e-4), max_norm=1.0)
>>> loss.backward(); opt.step(); opt.zero_grad()
>>> opt.total_norm  # on the device; reading it is the only synchronization
"""

from compileclip.clipped import clipped
from compileclip.eager.functional import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from compileclip.fallback import FallbackWarning
from compileclip.graph.training_step import compile
from compileclip.optimizer import ClippedOptimizer, wrap

__all__ = [
    "ClippedOptimizer",
    "FallbackWarning",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clipped",
    "compile",
    "get_total_norm",
    "wrap",
]

__version__ = "0.1.0"
