"""An optimizer that has another one's groups, state and hooks.

Private parts of torch used here, read in torch 2.13: ``_RecordFunctionFast``,
``_profiler_enabled`` and the dictionaries of hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from compileclip.validation import check_group

# As record_function, but without a trip through the dispatcher, which cost a quarter of the step
# of a small model.
_record = torch._C._profiler._RecordFunctionFast


class Delegate(Optimizer):
    """What of an optimizer belongs to the one it wraps.

    Attributes:
        optimizer: the wrapped optimizer.
    """

    optimizer: Optimizer
    total_norm: Any
    _stand_in: Any

    def _delegate_to(self, optimizer: Optimizer) -> None:
        """Share the hooks of ``optimizer``, and all that is read through it."""
        self.optimizer = optimizer
        for name, value in vars(optimizer).items():
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                self.__dict__[name] = value
        self._patch_step_function()

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """As torch's, which runs hooks and tells a profiler, where there is any of these.

        Elsewhere, and outside of ``torch.compile``, the step is ``_eager_step``.
        """
        with_hooks = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Delegate, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or self._has_hooks():
                return with_hooks(self, *args, **kwargs)
            with _record("Optimizer.step#ClippedOptimizer.step"):
                return self._eager_step(*args, **kwargs)

        return step

    def _eager_step(self, closure: Callable[[], Any] | None = None) -> Any:
        raise NotImplementedError

    @property
    def _opt_called(self) -> bool:
        return self.total_norm is not None

    @_opt_called.setter
    def _opt_called(self, value: bool) -> None:
        """Of no use: a scheduler says so of a trainer's object whose class is made of this one."""

    def _has_hooks(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups."""
        # Dynamo does more than that as it reads those of an optimizer.
        owner = self._stand_in.live if torch.compiler.is_compiling() else self.optimizer
        groups: list[dict[str, Any]] = owner.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state, by parameter."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's default hyperparameters."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's ``state_dict()``; clipping has no state of its own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of the optimizer, whether it was wrapped or not.

        Raises:
            ValueError: a parameter group asks for what would be ignored; nothing was loaded.
        """
        for group in state_dict.get("param_groups", ()):
            check_group({**group, "params": ()}, self.optimizer)
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer; the next norm takes it in.

        Raises:
            ValueError: as ``wrap``; nothing was added.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else params
        param_group["params"] = params if isinstance(params, set) else list(params)
        check_group(param_group, self.optimizer)
        self.optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        if "optimizer" not in self.__dict__:  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)


def decides_on_overflows(optimizer: Optimizer) -> bool:
    """Whether a ``GradScaler`` is to call the step on an overflow too, as the user has chosen.

    That is what it does with the bare optimizer where that is fused. The step may also decide where
    it counts on the device, which ``capturable`` asks for.
    """
    groups = optimizer.param_groups
    if any(all(group.get(name) for group in groups) for name in ("fused", "capturable")):
        return True
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
