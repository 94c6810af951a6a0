"""A kernel's first use: does it do to copies of real parameters what eager does?"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.buckets.bucket import Bucket
from compileclip.buckets.bucket_step import tensors
from compileclip.eager import reference
from compileclip.eager.optimizer_state import raw_step
from compileclip.lowering.target import Ended, Target
from compileclip.recording.shadow import NotPointwiseError

TENSORS = 3  # the smallest of a bucket
# How far apart the two may be, relative to the largest value: ATen's own square root is off by a
# last bit, and half precision rounds at every operation. A wrong program is farther.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def check(
    optimizer: Optimizer,
    bucket: Bucket,
    target: Target,
    kernel: Any,
    scalars: list[float],
    before: Mapping[str, Any],
    values: Mapping[str, Tensor],
) -> None:
    """Run ``kernel`` and the optimizer's own step on copies of the smallest parameters.

    Args:
        optimizer: the wrapped optimizer.
        bucket: the parameters.
        target: what runs ``kernel``.
        kernel: what is to be checked.
        scalars: of this step.
        before: the bucket's ``values`` before this step.
        values: "max_norm", 0-dim float64, and "norm", the total norm; "grad_scale" of a GradScaler.

    Raises:
        NotPointwiseError: they differ; nothing but copies was changed.
    """
    smallest = sorted(range(len(bucket.params)), key=bucket.sizes.__getitem__)[:TENSORS]
    params = [bucket.params[i] for i in smallest]
    states = [{k: v for k, v in bucket.states[i].items() if k in bucket.dtypes} for i in smallest]
    # What decides that a step does not count would leave nothing to compare.
    norm = torch.where(values["norm"].isfinite(), values["norm"], 1.0)
    values = {**values, "norm": norm, "found_inf": torch.zeros_like(norm, dtype=torch.float32)}
    staying = bucket.counts if bucket.stays else {}
    others = tensors(bucket.leader, before)
    others |= {k: v.view(-1)[0].clone() for k, v in staying.items()}

    theirs = _Copies(params, states, others)
    factor = _factor(kernel, values)
    if factor is not None:
        reference.scale_([p.grad for p in theirs.params if p.grad is not None], factor)
    theirs.step(optimizer, bucket)

    ours = _Copies(params, states, others)
    operands = kernel.program.operands
    names = [str(node.target) for node in operands]  # a node's name may have been changed
    columns = [ours.column(name, kernel) for name in names]
    table = _Table(array("Q", [tensor.data_ptr() for column in columns for tensor in column]))
    extent = target.extent(array("q", map(Tensor.numel, ours.params)))
    counts = {k: v.new_zeros(len(params)) for k, v in staying.items()}
    target.launch(kernel, target.resident(table), extent, scalars, values, counts, Ended(norm))
    # Powers of a count on the device are taken in its dtype, by another library than torch's.
    close = max((CLOSE[c.dtype] for c in staying.values() if c.dtype in CLOSE), default=0.0)
    for name in kernel.program.counted:
        for mine, state in zip(counts[name], theirs.states, strict=True):
            _compare(name, mine, state[name], others[name], close)
    for node, name, column in zip(operands, names, columns, strict=True):
        if node.name not in kernel.program.stored:
            continue
        for i, (mine, other) in enumerate(zip(column, theirs.column(name, kernel), strict=True)):
            was = params[i] if name == "param" else states[i].get(name, other)
            _compare(name, mine, other, was, close)


@dataclass
class _Table:
    """As ``pointers.Table``, of copies."""

    addresses: array[int]
    grads: slice = field(default_factory=lambda: slice(0, 0))


def _factor(kernel: Any, values: Mapping[str, Tensor]) -> Tensor | None:
    """What the kernel multiplies gradients by, as eager has it."""
    clips = "norm" in kernel.values and "max_norm" in kernel.values
    coef = reference.clip_coef(values["max_norm"].item(), values["norm"]) if clips else None
    if "grad_scale" not in kernel.values:
        return coef
    scale = values["grad_scale"]
    return scale.reciprocal() if coef is None else coef / scale


class _Copies:
    """Copies of parameters with their gradients and state."""

    def __init__(
        self, params: list[Tensor], states: list[dict[str, Tensor]], others: dict[str, Any]
    ) -> None:
        self.params: list[Tensor] = [torch.nn.Parameter(p.detach().clone()) for p in params]
        for mine, p in zip(self.params, params, strict=True):
            assert p.grad is not None
            if p.grad.dtype != p.dtype:
                mine.grad_dtype = p.grad.dtype
            mine.grad = torch.empty_like(p, dtype=p.grad.dtype).copy_(p.grad)
        self.states = [
            {k: copy(v) if not isinstance(v, Tensor) else v.clone() for k, v in given.items()}
            for given in ({**state, **others} for state in states)
        ]

    def step(self, optimizer: Optimizer, bucket: Bucket) -> None:
        """Run the optimizer's own step on them, one tensor after the other."""
        group = optimizer.param_groups[bucket.group]
        own: dict[str, Any] = {k: False for k in ("foreach", "fused") if k in group}
        own |= {"params": self.params} | ({"capturable": True} if bucket.stays else {})
        shadow: Any = object.__new__(type(optimizer))
        state = {p: s for p, s in zip(self.params, self.states, strict=True) if s}
        shadow.__dict__ = {
            **vars(optimizer),
            "param_groups": [{**group, **own}],
            "state": defaultdict(dict, state),
        }
        with torch.no_grad():
            raw_step(optimizer)(shadow)
        self.states = [shadow.state[p] for p in self.params]

    def column(self, name: str, kernel: Any) -> list[Tensor]:
        """The tensors of an operand; those of new state are empty."""
        if name == "param":
            return [p.detach() for p in self.params]
        if name == "grad":
            return [p.grad for p in self.params]  # type: ignore[misc]
        dtype = next(n.meta["val"].dtype for n in kernel.program.operands if n.target == name)
        for p, state in zip(self.params, self.states, strict=True):
            if name not in state:
                state[name] = torch.empty_like(p, dtype=dtype)
        return [state[name] for state in self.states]


def _compare(name: str, ours: Tensor, theirs: Tensor, before: Tensor, least: float) -> None:
    a, b = ours.double(), theirs.double()
    finite = b.isfinite()
    # What a step nearly cancels has the rounding errors of what was there before.
    largest = torch.maximum(b.abs(), before.detach().double().abs().nan_to_num())
    scale = largest[finite].max().item() if finite.any() else 1.0
    close = max(CLOSE[theirs.dtype], least)
    far = ((a - b).abs() > close * max(scale, 1e-30)) & finite
    if far.any() or not torch.equal(a.isfinite(), finite):
        raise NotPointwiseError(
            f"the compiled step makes another {name!r} of a parameter of shape "
            f"{tuple(ours.shape)} than eager does"
        )
