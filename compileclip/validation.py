"""What would be accepted and have no effect, or a wrong one: refused when an optimizer is wrapped.

Private marks are looked for here: those that torch 2.13, DeepSpeed, Megatron-Core and fairscale set
on parameters, and the modules in which torch and fairscale make an optimizer of some parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# Keys of a parameter group that would be taken to clip that group alone: our arguments, and what
# trainers and other libraries call theirs.
_OURS = ("max_norm", "norm_type", "norm_group", "nonfinite", "write_grads", "error_if_nonfinite")
_OF_OTHERS = """
    clip clip_grad clip_grad_norm clip_grad_value clip_mode clip_norm clip_value clipnorm clipvalue
    global_clipnorm grad_clip grad_clip_norm gradient_clip_algorithm gradient_clip_val
    gradient_clipping max_grad_norm max_grad_value
"""
BOUNDS = frozenset({*_OURS, *_OF_OTHERS.split()})
# By its mark, whose parameters or gradients are one rank's part of something larger.
_PARTS = {
    "_fsdp_flattened": "FSDP1 (FullyShardedDataParallel)",
    "_is_flat_param": "FSDP1 (FullyShardedDataParallel)",
    "_is_sharded": "fairscale's FSDP",
    "ds_id": "DeepSpeed's ZeRO-3",
    "_hp_mapping": "DeepSpeed's ZeRO",
    "tensor_model_parallel": "Megatron's tensor parallelism",
}
# By their module, what makes an optimizer on each rank for some of the parameters, and the remedy.
_SHARDING = {
    "torch.distributed.optim.zero_redundancy_optimizer": (
        "ZeroRedundancyOptimizer",
        "wrap that: compileclip.wrap(ZeroRedundancyOptimizer(params, {kind}, ...), max_norm)",
    ),
    "fairscale.optim.oss": ("fairscale's OSS", "call its clip_grad_norm before each step"),
}


def check_optimizer(optimizer: Optimizer, parts: bool = False) -> None:
    """See that nothing of ``optimizer`` keeps its wrapped step from meaning what it seems to.

    Args:
        optimizer: which is to be wrapped.
        parts: whether it is known that ranks hold parts of the parameters.

    Raises:
        ValueError: something does; the message says what, and what helps.
    """
    for module in filter(_SHARDING.__contains__, _callers()):
        (name, remedy), kind = _SHARDING[module], type(optimizer).__name__
        raise ValueError(
            f"{name} gives each rank some of the parameters, of which the {kind} that it makes "
            f"would take a norm of its own; let it make a bare one, and {remedy.format(kind=kind)}"
        )
    for group in optimizer.param_groups:
        check_group(group, optimizer, parts)


def check_group(group: Mapping[str, Any], optimizer: Optimizer, parts: bool = False) -> None:
    """See that a parameter group asks for nothing that would be ignored.

    Raises:
        ValueError: it does, or a parameter of it is one rank's part of something larger.
    """
    check_keys(group, optimizer)
    if group.get("differentiable"):
        raise ValueError(
            "differentiable=True: no gradient flows through a step that clips; call "
            "torch.nn.utils.clip_grad_norm_ on the gradients and step the bare optimizer"
        )
    for p in () if parts else group["params"]:
        if isinstance(p, Tensor):  # what else there may be, the optimizer will say
            check_parameter(p)


def _callers() -> Iterator[str]:
    """The modules of the functions that are running."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_globals.get("__name__", "")
        frame = frame.f_back  # type: ignore[assignment]


class Keys:
    """The keys of an optimizer's parameter groups, of which others may come at any time."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._not_its_own = BOUNDS.difference(optimizer.defaults)

    def check(self) -> None:
        """See that no group asks for what would be ignored; in each step.

        Raises:
            ValueError: one does.
        """
        for group in self._optimizer.param_groups:
            if not self._not_its_own.isdisjoint(group):
                check_keys(group, self._optimizer)


def check_keys(group: Mapping[str, Any], optimizer: Optimizer) -> None:
    """See that no key of a parameter group would be taken for a bound that holds.

    Raises:
        ValueError: one would, and it is no hyperparameter of the optimizer's own.
    """
    for key in BOUNDS.intersection(group):
        if key not in optimizer.defaults:
            raise ValueError(
                f"a parameter group has {key}={group[key]!r}, which would be ignored: one bound "
                "holds for all groups; leave it out, or clip that group by itself with "
                "compileclip.clip_grad_norm_ before the step"
            )


def misses_its_closure(error: Exception, given: bool) -> bool:
    """Whether a step failed since it was not given the closure, which the wrapper evaluates.

    Args:
        error: what the step raised.
        given: whether the wrapper was given one.
    """
    if "closure" in str(error).lower():
        return True
    trace = error.__traceback__
    if trace is None or "'NoneType' object is not callable" not in str(error):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return given or trace.tb_frame.f_locals.get("closure", error) is None


def missed_closure(optimizer: Optimizer) -> RuntimeError:
    """What to raise in place of such an error."""
    name = type(optimizer).__name__
    return RuntimeError(
        f"the step of {name} asks for its closure, which the wrapper evaluates once, before the "
        "norm; wrap the optimizer that it steps inside, or call compileclip.clip_grad_norm_ in the "
        f"closure and step the bare {name}"
    )


def check_parameter(param: Tensor) -> None:
    """See that ``param`` is not known to be one rank's part of a model.

    Raises:
        ValueError: it is, so that the norm would be that of the part.
    """
    own = vars(param)
    whose = next((who for mark, who in _PARTS.items() if own.get(mark, False) is not False), None)
    if whose is not None:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is one rank's part, of {whose}: each rank "
            "would clip by the norm of its own part; clip with that library's own function (such "
            "as FullyShardedDataParallel.clip_grad_norm_) and step the bare optimizer, wrap with "
            "process_group=, the ranks that hold the parts, or shard with FSDP2 "
            "(torch.distributed.fsdp.fully_shard)"
        )
