"""A program: the pointwise part of a step for one parameter, as a graph to be compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node


@dataclass(frozen=True, eq=False)
class Program:
    """What one kernel does for every element of every tensor of a bucket.

    ``graph`` holds functional pointwise ATen operations, in the order that eager runs them. Its
    placeholders stand for, told apart by ``meta["val"]``:

    * a 1-dim tensor on the meta device: an operand, one tensor per parameter (the parameter, its
      gradient, its state), read and written element by element;
    * a 0-dim tensor on the meta device: read from memory once per launch, for all parameters;
    * a float: a scalar in float64 that the host passes at each launch.

    Each ``call_function`` node has its value in ``meta["val"]`` as well: a tensor on the meta
    device whose dtype is the one eager rounds to. The output is a tuple of nodes.

    Attributes:
        graph: the operations.
        stored: the operands, by ``node.name``, that take the graph's first outputs, in their order.
        counted: the names of state that is one number for all parameters, such as step counts; it
            takes the outputs that follow, which are 0-dim.
        conditional: whether there is one more output, a 0-dim bool: where it is false, nothing is
            stored.
    """

    graph: Graph
    stored: tuple[str, ...]
    counted: tuple[str, ...] = ()
    conditional: bool = False

    @property
    def operands(self) -> list[Node]:
        """Placeholders of one tensor per parameter."""
        return self._tensors(1)

    @property
    def values(self) -> list[Node]:
        """Placeholders of one 0-dim tensor per launch."""
        return self._tensors(0)

    @property
    def scalars(self) -> list[Node]:
        """Placeholders of floats."""
        return [n for n in self._inputs() if isinstance(n.meta["val"], float)]

    @property
    def results(self) -> tuple[Node, ...]:
        """The nodes that are stored, in the order of ``stored``."""
        return self._outputs[: len(self.stored)]

    @property
    def counts(self) -> tuple[Node, ...]:
        """The nodes of ``counted``, in its order."""
        return self._outputs[len(self.stored) :][: len(self.counted)]

    @property
    def condition(self) -> Node | None:
        """The node that decides whether anything is stored, if one does."""
        return self._outputs[-1] if self.conditional else None

    @property
    def _outputs(self) -> tuple[Node, ...]:
        (outputs,) = self.graph.output_node().args
        return tuple(outputs)  # type: ignore[arg-type]  # an FX argument

    def _tensors(self, ndim: int) -> list[Node]:
        values = [(n, n.meta["val"]) for n in self._inputs()]
        return [n for n, value in values if isinstance(value, Tensor) and value.dim() == ndim]

    def _inputs(self) -> list[Node]:
        return list(self.graph.find_nodes(op="placeholder"))


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of a node's value; a float's is float64."""
    value = node.meta["val"]
    return value.dtype if isinstance(value, Tensor) else torch.float64
