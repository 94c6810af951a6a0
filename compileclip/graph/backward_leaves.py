"""The leaves of a training step in one graph: what ``backward()`` leaves gradients in.

Where Dynamo traces ``loss.backward()``, it takes gradients with regard to the leaves among the
inputs of its graph, and adds them up. Two things get lost there, without a word, and are looked
after here:

* A tensor marked as a guarded static address is no input but a constant, and gets no gradient.
  Dynamo so marks, for good, the parameters of each optimizer whose ``param_groups`` it reads.
* Hooks of a leaf belong to autograd's engine, which does not run.

Private parts of torch used here, read in torch 2.11 to 2.14: ``get_static_address_type``,
``InstructionTranslator``, ``OptimizerVariable`` and ``TensorVariable`` of Dynamo, ``tensor_hooks``,
``nn_modules`` and ``meta["grapharg"]`` of its graphs, ``_backward_hooks`` and
``_post_accumulate_grad_hooks`` of tensors.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from compileclip.delegate import Delegate

UNKNOWN = f"torch {torch.__version__} keeps elsewhere what decides on gradients in one graph"
HOOKED = "a parameter has a hook that its gradient has to pass"
WITHOUT_GRADIENTS = "no parameter has a gradient in this step"


class _Thread(threading.local):
    leaves: Leaves | None = None  # of the training step that this thread runs in one graph


_thread = _Thread()


class Leaves:
    """The leaves of one compiled training step, as far as its traces have shown them."""

    def __init__(self) -> None:
        self._seen: tuple[weakref.ref[Tensor], ...] = ()

    @contextlib.contextmanager
    def stay_inputs(self) -> Iterator[None]:
        """While Dynamo traces here, leaves become inputs of the graph, however they are marked."""
        before, _thread.leaves = _thread.leaves, self
        try:
            yield
        finally:
            _thread.leaves = before

    def add(self, leaves: Iterable[Tensor]) -> None:
        """Remember ``leaves``, without keeping them alive."""
        known = {id(leaf): ref for ref in self._seen if (leaf := ref()) is not None}
        self._seen = tuple((known | {id(leaf): weakref.ref(leaf) for leaf in leaves}).values())

    def hooked(self) -> bool:
        """Whether one of them has a hook by now. Dynamo has no guard on that."""
        for ref in self._seen:
            leaf = ref()
            if leaf is not None and (leaf._backward_hooks or leaf._post_accumulate_grad_hooks):
                return True
        return False


def why_not_backward(params: Iterable[Tensor] = ()) -> str | None:
    """Why gradients of the graph being traced are not eager's, or None.

    Args:
        params: leaves that the graph's inputs may not have yet.
    """
    if not torch._dynamo.config.trace_autograd_ops:
        return None  # backward() runs in eager mode
    output: Any = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output
    arguments = (node.meta.get("grapharg") for node in output.graph.find_nodes(op="placeholder"))
    inputs = _leaves(argument.example for argument in arguments if argument is not None)
    leaves = _thread.leaves or Leaves()
    leaves.add([*inputs, *_leaves(params)])
    if leaves.hooked() or output.side_effects.tensor_hooks:  # traced ones too
        return HOOKED
    if _leaves(output.nn_modules.values()):
        return "a parameter is a constant of the graph, where backward() leaves no gradient"
    return None


def _leaves(values: Iterable[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and v.is_leaf and v.requires_grad]


def patch_dynamo() -> bool:
    """Have Dynamo leave alone what it is not to touch; the second time this does nothing.

    * In training steps in one graph no mark is a guarded one. A tensor marked as static without a
      guard is what a module's parameter is to Dynamo anyway.
    * There, and of wrappers anywhere, reading ``param_groups`` does not make groups capturable. If
      a traced function wrote into such a group, the real one, on a CPU too, would be so for good.
    * Before it traces a ``backward()``, it asks whether that would leave eager's gradients.

    For good and asking each time, since to patch and restore would not do in several threads.

    Returns:
        Whether that is done: another version of torch may have no such places.
    """
    variables: Any = torch._dynamo.variables
    try:
        builder, variable = variables.builder, variables.optimizer.OptimizerVariable
        tensor = variables.tensor.TensorVariable
        address_type, set_capturable = builder.get_static_address_type, variable._set_capturable
        backward = tensor.method_backward
    except AttributeError:
        return False
    if getattr(address_type, "of_compileclip", False):
        return True

    def get_static_address_type(t: Any) -> Any:
        kind = address_type(t)
        return "unguarded" if kind == "guarded" and _thread.leaves is not None else kind

    def _set_capturable(self: Any, tx: Any) -> None:
        if _thread.leaves is None and not isinstance(self.value, Delegate):
            set_capturable(self, tx)

    def method_backward(self: Any, *args: Any, **kwargs: Any) -> Any:
        reason = why_not_backward()
        if reason is not None:
            kind, explanation = "backward() that loses gradients", f"compileclip: {reason}"
            torch._dynamo.exc.unimplemented(
                gb_type=kind, context="", explanation=explanation, hints=[]
            )
        return backward(self, *args, **kwargs)

    get_static_address_type.of_compileclip = True  # type: ignore[attr-defined]  # a mark
    builder.get_static_address_type = get_static_address_type
    variable._set_capturable = _set_capturable
    tensor.method_backward = method_backward
    table = getattr(tensor, "tp_methods", {})  # where torch 2.14 looks it up
    if "backward" in table:
        table["backward"] = type(table["backward"])(method_backward)
    return True
