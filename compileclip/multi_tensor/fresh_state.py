"""State that a step makes before it is known whether the step counts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from compileclip.eager.optimizer_state import initialize_state


class FreshState:
    """The parameters whose state a step has made."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._params: list[Tensor] = []

    def make(self, params: Sequence[Tensor]) -> None:
        """Make the state that a first step with ``params``, which have gradients, would make."""
        self._params = [p for p in params if not self._optimizer.state.get(p)]
        initialize_state(self._optimizer, with_grad=True, capturable=False)

    def keep(self) -> None:
        """The step counts."""
        self._params = []

    def forget(self) -> bool:
        """Take back what was made, for a step that does not count; whether anything was."""
        for p in self._params:
            self._optimizer.state.pop(p, None)
        made, self._params = bool(self._params), []
        return made
