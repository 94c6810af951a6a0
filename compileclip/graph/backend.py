"""``torch.compile(fn, backend="compileclip")``: Inductor with the passes, for unchanged code.

Registered as an entry point of ``torch_dynamo_backends``. Private parts of torch used here, read in
torch 2.11 to 2.13: ``compile_fx``, and ``_TorchCompileInductorWrapper``, which turns ``mode=`` and
``options=`` into Inductor's configuration and says what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from compileclip.lowering import is_disabled


def compileclip(
    module: GraphModule,
    inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured, as ``backend="inductor"`` does, with our passes.

    With ``COMPILECLIP_DISABLE=1`` in the environment, the graph runs in eager mode instead;
    ``COMPILECLIP_DISABLE_PASSES`` leaves out the passes that it names.

    Args:
        module: the captured graph.
        inputs: its inputs, as Dynamo gives them.
        mode: as in ``torch.compile``.
        options: as in ``torch.compile``; a pass in ``post_grad_custom_pre_pass`` runs before ours.

    Returns:
        The compiled function.

    Raises:
        RuntimeError: an unknown mode or option, with torch's own message.
        ValueError: ``COMPILECLIP_DISABLE_PASSES`` names no pass.
    """
    if is_disabled():
        return module.forward
    from torch._inductor.compile_fx import compile_fx

    from compileclip import passes
    from compileclip.graph.inductor_passes import patches, run

    for each in passes.captured_passes():
        run(each, module.graph)
    module.recompile()

    wrapper = torch._TorchCompileInductorWrapper(mode, options, None)
    compiled = compile_fx(module, list(inputs), config_patches=patches(wrapper.config))
    return cast("Callable[..., Any]", compiled)  # anything else is compiled ahead of time
