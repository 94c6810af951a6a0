"""Whether it is worth while to plan: not where the next step needs another plan."""

from __future__ import annotations

ENOUGH = 4  # steps that a plan should serve; to make one takes some milliseconds and more
TRIES = 4  # plans in a row that served fewer
REST = (16, 1024)  # steps in eager mode until the next try, at first and at most


class PlanBackoff:
    """With gradients that come and go, as in a mixture of experts, plans are short-lived.

    Attributes:
        steps: that the last plan served, which whoever takes them counts.
    """

    def __init__(self) -> None:
        self.steps = ENOUGH
        self._short = self._rest = self._left = 0

    def may_plan(self) -> bool:
        """Whether to make another plan for this step."""
        may = self._may_plan()
        self.steps = 0 if may else self.steps
        return may

    def _may_plan(self) -> bool:
        if self._left:
            self._left -= 1
            return self._left == 0
        self._short = self._short + 1 if self.steps < ENOUGH else 0
        self._rest = self._rest if self._short else 0
        if self._short <= TRIES:
            return True
        self._rest = min(2 * self._rest or REST[0], REST[1])
        self._left = self._rest
        return False
