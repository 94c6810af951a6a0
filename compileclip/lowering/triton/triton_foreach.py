"""Lists of plain tensors on one GPU, as the functions of ``torch.nn.utils`` are given them.

The norm takes one launch per dtype and one that adds up; to scale or to clamp takes one per dtype.
While a CUDA graph is captured torch's own kernels do it: what is made up here for one call, such as
the list of addresses, would have to live as long as the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from compileclip.fallback import UnsupportedError, warn_fallback
from compileclip.lowering import has_triton, is_disabled, plain_tensors

if TYPE_CHECKING:
    from compileclip.lowering.triton.triton_norm import List
    from compileclip.native.native_foreach import Task

_T = TypeVar("_T")
ORDERS = (1.0, 2.0, math.inf)
DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
NUMBERS = {torch.float32, torch.float64}  # of norms and factors
_dtype, _device = attrgetter("dtype"), attrgetter("device")
_failed = False  # a kernel of this process


def total_norm(
    tensors: Sequence[Tensor], norm_type: float, dtype: torch.dtype | None = None
) -> Tensor | None:
    """The norm of ``tensors`` seen as one vector, as ``reference.total_norm``; None if not served.

    Served are plain tensors on one GPU, for p = 1, 2 and inf.
    """
    found = total_norm_again(tensors, norm_type, dtype)
    if found is not None or norm_type not in ORDERS or not _serves(tensors):
        return found
    from compileclip.native.native_foreach import Task, remember

    dense = [t if _has_each_once(t) else t.contiguous() for t in tensors]
    lists = _lists(dense)

    def run() -> Tensor:
        from compileclip.lowering.triton.triton_norm import Shares

        shares = Shares(lists, norm_type, dtype)
        shares.end()
        remember(Task(norm_type, dtype=dtype), dense[0], shares.launches)
        return shares.total

    return _tried(run, "the norm's kernel") if lists else None


def total_norm_again(
    tensors: Sequence[Tensor], norm_type: float, dtype: torch.dtype | None = None
) -> Tensor | None:
    """As ``total_norm``, once that has run for such tensors; it looks at each but once."""
    if norm_type not in ORDERS or not _is_there(tensors[0].device):
        return None
    from compileclip.native.native_foreach import Task

    return _quickly(tensors, tensors[0], Task(norm_type, dtype=dtype))


def on_gradients(
    params: list[Tensor],
    norm_type: float | None = None,
    kind: str | None = None,
    bound: float = 0.0,
    number: Tensor | None = None,
) -> Tensor | None:
    """``total_norm``, ``clip_`` or ``clamp_`` of gradients, once it has run for such gradients.

    Args:
        params: whose gradients, where they have one.
        norm_type: the order of the norm that is to be taken, or None.
        kind: what is written, ``"clip"`` or ``"clamp"``.
        bound: to which.
        number: the norm, where one is needed and none taken.

    Returns:
        The norm, or what else is no None; None, and nothing was done, where that is not served.
    """
    first = next((p.grad for p in params if p.grad is not None), None)
    if first is None or not _is_there(first.device):
        return None
    if norm_type not in (None, *ORDERS) or (number is not None and not _is_number(number, first)):
        return None
    from compileclip.native.native_foreach import Task

    return _quickly(params, first, Task(norm_type, kind, bound, number, from_grads=True))


def _quickly(tensors: Sequence[Tensor], first: Tensor, task: Task) -> Tensor | None:
    """What ``native_foreach.run`` returns, if that may be asked."""
    if _failed or type(tensors) is not list or not plain_tensors.runs_for_real() or is_disabled():
        return None
    from compileclip.native import native_foreach
    from compileclip.native.native_build import CompilerError

    try:
        return native_foreach.run(tensors, first, task)
    except (UnsupportedError, CompilerError):
        return None


def scale_(tensors: Sequence[Tensor], scale: Tensor) -> bool:
    """Multiply ``tensors`` in place by ``scale``, 0-dim, in float32 or float64, and round once.

    Returns:
        Whether that was done; not where tensors are not served, have gaps or share memory.
    """
    return _written(tensors, scale, "scale", 0.0)


def clip_(tensors: Sequence[Tensor], max_norm: float, norm: Tensor) -> bool:
    """Scale ``tensors`` in place by ``reference.clip_coef(max_norm, norm)``, as ``scale_``."""
    return _written(tensors, norm, "clip", max_norm)


def clamp_(tensors: Sequence[Tensor], most: float) -> bool:
    """Clamp ``tensors`` in place to ``[-most, most]``; whether that was done, as ``scale_``."""
    return _written(tensors, None, "clamp", most)


def _written(tensors: Sequence[Tensor], number: Tensor | None, kind: str, bound: float) -> bool:
    first = tensors[0]
    if not _is_there(first.device) or (number is not None and not _is_number(number, first)):
        return False
    from compileclip.native.native_foreach import Task, remember

    task = Task(kind=kind, bound=bound, number=number)
    if _quickly(tensors, first, task) is not None:
        return True
    if not _serves(tensors) or not all(map(_has_each_once, tensors)):
        return False

    lists = _lists(tensors)
    if not lists or not _are_apart(tensors):
        return False

    done: list[str] = []

    def run() -> bool:
        from compileclip.lowering.triton.triton_scale import write

        for each in lists:
            launches = write([each], number, kind, bound)
            done.append(str(each.dtype))
        if len(lists) == 1:
            remember(task, first, launches)
        increment_version(tensors)
        return True

    return bool(_tried(run, "the kernel that scales gradients", done))


def _is_number(number: Tensor, first: Tensor) -> bool:
    """Whether kernels can read ``number`` where ``first`` is."""
    return (
        type(number) in plain_tensors.PLAIN
        and number.device == first.device
        and number.dim() == 0
        and number.dtype in NUMBERS
    )


def _serves(tensors: Sequence[Tensor]) -> bool:
    """Whether ``tensors`` are plain ones on one GPU, and kernels may replace torch's."""
    first = tensors[0]
    return (
        _is_there(first.device)
        and not _failed
        and plain_tensors.PLAIN.issuperset(map(type, tensors))
        and len(set(map(_device, tensors))) == 1
        and set(map(_dtype, tensors)) <= DTYPES
        and all(t.layout == torch.strided for t in tensors)
        and plain_tensors.runs_for_real()
        and not is_disabled()
    )


def _is_there(device: torch.device) -> bool:
    """Whether ``device`` is one that has kernels, of which none is being captured."""
    return device.type == "cuda" and has_triton() and not torch.cuda.is_current_stream_capturing()


def _tried(run: Callable[[], _T], what: str, done: Sequence[str] = ()) -> _T | None:
    """What ``run`` returns; None, for good, where Triton cannot compile it.

    Raises:
        RuntimeError: it fails with gradients of the dtypes ``done`` written, which must not be
            written again.
    """
    global _failed
    try:
        return run()
    except UnsupportedError:
        return None
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler that another torch brings
        _failed = True
        if done:
            raise RuntimeError(
                f"{what} failed with gradients of {', '.join(done)} written and others not: "
                f"{error}; do not step with them, and set COMPILECLIP_DISABLE=1"
            ) from error
        warn_fallback(what, f"its first run failed: {error}", "report it")
        return None


def _lists(tensors: Sequence[Tensor]) -> list[List]:
    """``tensors``, without gaps, as kernels take them: a list per dtype; none without memory."""
    from compileclip.lowering.triton.triton_lists import on_device
    from compileclip.lowering.triton.triton_norm import List, chunks

    device, found = tensors[0].device, []
    for dtype in dict.fromkeys(map(_dtype, tensors)):
        group = [t for t in tensors if t.dtype == dtype]
        try:
            pointers = list(map(Tensor.data_ptr, group))
        except RuntimeError:  # a wrapper of functorch's
            return []
        sizes, blocks = chunks(tuple(map(Tensor.numel, group)), device)
        found.append(List(on_device(pointers, device), sizes, blocks, dtype))
    return found


def _has_each_once(tensor: Tensor) -> bool:
    """Whether the memory of ``tensor`` holds each of its elements once, and nothing else."""
    return tensor.is_contiguous() or plain_tensors.is_dense(tensor)


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether no two of ``tensors`` share memory: they are written at the same time."""
    spans = sorted((t.data_ptr(), t.numel() * t.element_size()) for t in tensors if t.numel())
    return all(a + size <= b for (a, size), (b, _) in pairwise(spans))
