"""What steps in the place of a bucket's parameters, to show what the step is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from compileclip.traced import raw_step

SHAPES = ((2, 3), (5,))  # a step is the same for both, or refused


class NotPointwiseError(ValueError):
    """A step cannot become a program; the message says why."""


class Shadow:
    """Stands for all parameters of a bucket.

    Attributes:
        optimizer: the real one.
        tensors: the tiny operands: "param", "grad", and state.
        state: what the last step left as state.
        changes: what the last step changed in the parameter group.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        dtypes: Mapping[str, torch.dtype],
        shape: tuple[int, ...] = SHAPES[0],
    ) -> None:
        """Make it for ``optimizer``, with operands of ``dtypes`` and of ``shape``."""
        self.tensors = {
            name: torch.ones(shape, dtype=dtype, device="cpu") for name, dtype in dtypes.items()
        }
        self.tensors["param"] = torch.nn.Parameter(self.tensors["param"])
        self.tensors["param"].grad = self.tensors["grad"]
        self.state: dict[str, Any] = {}
        self.changes: dict[str, Any] = {}
        self.optimizer = optimizer
        self._raw_step = raw_step(optimizer)
        self._stepping: Any = object.__new__(type(optimizer))
        # Dynamo is kept out of this one, which takes as long as four operations.
        init_group = getattr(type(optimizer), "_init_group", None)
        bare = getattr(init_group, "_torchdynamo_orig_callable", None)
        self._bound = {} if bare is None else {"_init_group": partial(bare, self._stepping)}

    def step(
        self,
        group: Mapping[str, Any],
        others: Mapping[str, Any],
        props: Mapping[str, Any] | None = None,
    ) -> None:
        """Run the optimizer's own step on the tiny parameter.

        Args:
            group: the parameter group, whose hyperparameters count.
            others: the state that is no operand; its 0-dim tensors are written to.
            props: what takes the place of ``tensors``, if anything does.

        Raises:
            NotPointwiseError: the step changes an attribute of the optimizer.
        """
        tensors = self.tensors if props is None else props
        param = tensors["param"]
        given = {**group, "params": [param]}
        for name in ("foreach", "fused"):
            if name in given:
                given[name] = False
        tiny = {k: v for k, v in tensors.items() if k not in ("param", "grad")}
        state = {**tiny, **others}
        attributes = {**vars(self.optimizer), **self._bound, "param_groups": [dict(given)]}
        attributes["state"] = defaultdict(dict, {param: state} if state else {})
        self._stepping.__dict__ = dict(attributes)
        with torch.no_grad():
            self._raw_step(self._stepping)
        after = self._stepping.__dict__
        changed = [k for k in after if after[k] is not attributes.get(k)]
        if changed:
            raise NotPointwiseError(f"the step changes the optimizer's {changed[0]!r}")
        self.state = dict(after["state"][param])
        now = after["param_groups"][0]
        self.changes = {k: v for k, v in now.items() if v is not given.get(k)}
