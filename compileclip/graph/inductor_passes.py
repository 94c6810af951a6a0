"""The passes in Inductor's slot: the one file that touches ``torch._inductor``'s slots for passes.

Read in torch 2.11 to 2.13: ``post_grad_custom_pre_pass`` takes one pass, from 2.13 on a list or a
tuple too. Ours always is one, which calls the user's before it runs its own, so that both are kept
in every version. Nothing process-wide is set: whoever compiles hands ``patches`` to ``compile_fx``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch._inductor import config, custom_graph_pass
from torch.fx import Graph

import compileclip.passes as passes
from compileclip.eager import operators, reference
from compileclip.fallback import warn_fallback

SLOT = "post_grad_custom_pre_pass"

# How many arguments a foreach kernel may have; an update of AdamW counts 15 per parameter. CUDA
# takes 4 KiB of them, 512 pointers, of which triton adds two.
MAX_ARGUMENTS = "combo_kernel_max_num_args"
ARGUMENTS = 500

# Its subclasses are told whether the graph is for inference; a user's pass may ask for that.
_Base: Any = getattr(
    custom_graph_pass, "CustomInferenceAwareGraphPass", custom_graph_pass.CustomGraphPass
)


def patches(
    options: Mapping[str, Any], ordered: Sequence[Callable[[Graph], int]] | None = None
) -> dict[str, Any]:
    """Inductor's ``config_patches`` that add the passes, and larger kernels, to ``options``.

    Args:
        options: what the user set; a pass of theirs in our slot, here or in
            ``torch._inductor.config``, is taken in.
        ordered: the passes, by default ``compileclip.passes.default_passes()``.

    Returns:
        ``options`` with our pass in the slot; what they set themselves stays.
    """
    theirs = options[SLOT] if SLOT in options else getattr(config, SLOT)
    if theirs is None:
        theirs = ()
    elif not isinstance(theirs, list | tuple):
        theirs = (theirs,)
    ordered = passes.default_passes() if ordered is None else ordered
    return {
        MAX_ARGUMENTS: max(ARGUMENTS, getattr(config, MAX_ARGUMENTS)),
        **options,
        SLOT: OrderedPasses(tuple(ordered), tuple(theirs)),
    }


class OrderedPasses(_Base):  # type: ignore[misc]  # which class it is depends on torch
    """One pass for a slot: the user's passes, then ours in their order.

    A pass of ours that raises is left out, with one ``FallbackWarning``; the user's may raise.

    Attributes:
        ordered: our passes; their ``repr`` tells their fields, as a dataclass's does.
        theirs: the user's passes in the same slot.
    """

    def __init__(self, ordered: tuple[Callable[[Graph], int], ...], theirs: tuple[Any, ...]):
        self.ordered, self.theirs = ordered, theirs

    def __call__(self, graph: Graph, is_inference: bool = False) -> None:
        """Run all passes on ``graph``."""
        for theirs in self.theirs:
            if _is_inference_aware(theirs):
                theirs(graph, is_inference)
            else:
                theirs(graph)
        for ours in self.ordered:
            run(ours, graph)

    def uuid(self) -> Any | None:
        """What Inductor's caches know us by: our passes that run, code and fields, and the user's.

        None, which turns caching off, where a pass of the user's has no uuid, or no pass of ours
        keeps the caches from mixing up floats.
        """
        if not passes.may_be_cached():
            return None
        theirs = [p.uuid() if hasattr(p, "uuid") else None for p in self.theirs]
        if not all(theirs):
            return None
        code = custom_graph_pass.get_hash_for_files(self._files(), repr(self.ordered))
        return (code, *theirs)

    def _files(self) -> tuple[str, ...]:
        files = {__file__, str(operators.__file__), str(reference.__file__)}
        files |= {inspect.getfile(type(p)) for p in self.ordered}
        files |= {str(path) for path in Path(str(passes.__file__)).parent.glob("*.py")}
        return tuple(sorted(files))


def run(ours: Callable[[Graph], int], graph: Graph) -> None:
    """Run a pass of ours on ``graph``, or warn and leave ``graph`` as it is where it raises."""
    # A pass that raises halfway would leave the graph broken: what fails, fails on a copy.
    try:
        changed = ours(copy.deepcopy(graph))
    except Exception as error:
        name = getattr(ours, "name", type(ours).__name__)
        warn_fallback(
            f"the pass {name}",
            f"it raised {type(error).__name__}: {error}",
            f"report this to compileclip; the result is right, compiled without {name}",
            to="torch's own code",
        )
        return
    if changed:
        ours(graph)


def _is_inference_aware(user_pass: object) -> bool:
    base = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
    return base is not None and isinstance(user_pass, base)
