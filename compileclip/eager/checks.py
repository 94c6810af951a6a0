"""What is refused of a norm and of foreach kernels, and what is said of a norm that is not finite.

Private parts of torch used here, read in torch 2.11 to 2.13: ``_device_has_foreach_support``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._foreach_utils import _device_has_foreach_support


def nonfinite_message(norm_type: float, total_norm: Tensor) -> str:
    """What to tell whoever asked for an error on a non-finite norm."""
    return (
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite "
        f"({total_norm.item()}), so it cannot be clipped. Nothing was changed. Look for the "
        "gradient that is NaN or infinite (torch.autograd.set_detect_anomaly(True) finds where it "
        "arose), or do without this error: `error_if_nonfinite=False` of the functions, "
        '`nonfinite="skip"` of the wrapper'
    )


def check_foreach(tensors: Sequence[Tensor], foreach: bool | None) -> None:
    """See that ``foreach=True`` can be had for ``tensors``.

    Raises:
        RuntimeError: it cannot.
    """
    if not foreach:
        return
    for device in {t.device for t in tensors}:
        if not _device_has_foreach_support(device):
            raise RuntimeError(
                f"foreach=True was passed, but can't use the foreach API on {device.type} "
                "tensors; pass foreach=None"
            )


def check_norm_type(norm_type: float) -> float:
    """``norm_type`` as a float.

    Raises:
        ValueError: it is NaN.
    """
    norm_type = float(norm_type)
    if norm_type != norm_type:  # NaN; Dynamo knows no isnan of a float that varies
        raise ValueError(
            "norm_type is nan, which is no order of a norm; pass a number or float('inf')"
        )
    return norm_type


def check_layouts(tensors: Sequence[Tensor], norm_type: float) -> None:
    """See that ``tensors``, dense or sparse, have a norm of order ``norm_type``.

    Raises:
        ValueError: one has none.
    """
    for t in tensors:
        if t.layout == torch.strided or (t.layout == torch.sparse_coo and norm_type > 0):
            continue
        if t.layout == torch.sparse_coo:
            raise ValueError(
                f"norm_type={norm_type} of a sparse gradient: for p <= 0 the zeros that it does "
                "not store would decide the norm; take p > 0 or dense gradients"
            )
        raise ValueError(
            f"a gradient with layout {t.layout} has no total norm here; convert it with "
            ".to_dense() or .to_sparse()"
        )
