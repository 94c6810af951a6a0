"""Programs as Triton kernels: one launch updates every tensor of a bucket, on a GPU.

A kernel finds its tensors in a table of addresses. Each block of ``BLOCK`` elements is one Triton
program; a full block of aligned tensors runs without masks, so that its loads are 16 bytes wide,
and every other block with them. The host's scalars are kernel arguments annotated as float64,
which Triton neither rounds nor specialises on: nothing is compiled again when they change.

Rounding is that of ATen's CUDA kernels, by their source (``BinaryDivTrueKernel.cu``, ``Lerp.h``,
``DeviceAddCmulCdiv.cuh``, ``PowKernel.cu``) and nvcc's defaults: a product and a sum within one
functor are contracted, division and square root are IEEE's, subnormals are kept. So:

* ``add``, ``sub``, ``rsub`` with alpha: ``fma(alpha, b, a)``
* ``lerp``: ``fma(weight, b - a, a)`` where ``|weight| < 0.5``, else
  ``fma(b - a, -(1 - weight), b)``
* ``addcmul``: ``fma(value, b * c, a)``, and ``fma(b, c, a)`` where value is 1
* ``addcdiv``: ``fma(value, b / c, a)``
* ``div`` by a number of the host: a product with its reciprocal, which is taken in float64
* ``pow``: products for 2, 3 and -2, ``sqrt``, ``rsqrt`` and ``reciprocal`` for 0.5, -0.5 and -1
* otherwise ``pow``, ``exp`` and ``log`` are those of the libdevice that Triton brings, without its
  contractions. torch's are of its CUDA version: the last bits of a ``pow`` may differ, and so those
  of ``beta ** step`` where step counts stay on the device
* float16 and bfloat16: each operation in float32, rounded once
* a number of the host is taken in the dtype that is computed in, so float32 for these two; but in
  theirs as an exponent and where it is compared with, as it is where it fills a tensor

``tests/lowering/aten_cuda.py`` is a model of that, which the kernels are held against without a
GPU; on one, ``tests/lowering/test_lowering_triton.py`` holds them against ATen itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compileclip.lowering.program import Program
from compileclip.lowering.triton.triton_module import load
from compileclip.lowering.triton.triton_norm import SECOND, Shares
from compileclip.lowering.triton.triton_source import source
from compileclip.native.cuda_driver import Launch

BLOCK = 1024  # elements per Triton program: 8 per thread, two 16-byte loads of float32 in flight
# Contraction is written out where ATen has it, and libdevice keeps subnormals as nvcc's code does.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "enable_reflect_ftz": False}
# AMD's warps are twice as wide, and its backend does not have the last option.
AMD_OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Tables:
    """A bucket of N tensors, as kernels take it.

    Attributes:
        addresses: int64 ``[operands, N]``, contiguous: of each tensor.
        sizes: int64 ``[N]``: how many elements each has.
        blocks: ``block_list`` of the sizes in blocks of ``BLOCK``.
        slots: int64, one for each of the kernel's ``slots``; what lies there is written and read
            within a step.
    """

    addresses: Tensor
    sizes: Tensor
    blocks: Tensor
    slots: Tensor


class Kernel:
    """A program, ready to be launched over a bucket.

    Attributes:
        program: what it was made of.
        values: what ``program.values`` stand for.
        slots: how many numbers its first kernel leaves for its second.

    Args:
        program: its operands are float32, float64, float16 or bfloat16.

    Raises:
        UnsupportedError: there is no Triton code for an operation or a dtype.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values = [str(node.target) for node in program.values]  # a name may have been changed
        made = source(program)
        self.slots = made.slots
        module = load(made.text)
        self._once, self._step = module.compileclip_once, module.compileclip_step

    def __call__(
        self,
        tables: Tables,
        scalars: Sequence[float],
        values: Mapping[str, Tensor],
        counts: Mapping[str, Tensor],
        shares: Shares,
    ) -> list[Launch]:
        """Update N tensors on the current stream; nothing waits for the device.

        Args:
            tables: of the bucket.
            scalars: in the order of ``program.scalars``.
            values: 0-dim tensors on the device, by what they stand for; of more elements, the first
                counts. "norm" is in ``shares``.
            counts: of each of ``program.counted``, a tensor ``[N]`` that it is stored to.
            shares: the total norm, which is ended here where it is not yet.

        Returns:
            What was launched; the arguments of the first end with ``scalars``.
        """
        read = [values[name] for name in self.values if name != "norm"]
        stored = [counts[name] for name in self.program.counted]
        number, blocks = tables.sizes.shape[0], len(tables.blocks)
        given = (*shares.open, tables.slots, number, *read, *stored, *scalars)
        launches = [Launch(self._once, 1, given, {**shares.constants, **SECOND})]
        if blocks:
            lists = (tables.addresses, tables.sizes, tables.blocks, tables.slots, number)
            constants = {"BLOCK": BLOCK, **options(tables.sizes.device)}
            launches.append(Launch(self._step, blocks, lists, constants))
        with torch.cuda.device_of(tables.sizes):
            for each in launches:
                each.run()
        shares.note_ended()
        return launches


def options(device: torch.device) -> dict[str, Any]:
    """Those of an update's launch."""
    given = OPTIONS if torch.version.hip is None else AMD_OPTIONS
    return {**given, "PACKED": packs(device)}


@functools.cache
def packs(device: torch.device) -> bool:
    """Whether two numbers are rounded to half precision at once; the interpreter does not."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)
