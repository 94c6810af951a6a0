"""Programs as C++: operations round as ATen's do, at any size, alignment and thread count."""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from lowering_cases import CASES, CLOSE, LAST_PLACE, UNLIKE_TAILS
from lowering_programs import ADAMW_SCALARS, adamw, aten, program, run_eager
from torch import Tensor
from torch.fx import Proxy

from compileclip.fallback import UnsupportedError
from compileclip.lowering import CHUNK
from compileclip.lowering.cpp.cpp_kernel import Kernel
from compileclip.lowering.cpp.cpp_loop import RUN
from compileclip.lowering.program import Program, dtype_of
from compileclip.native import native_build

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
HALF = (BF16, F16)

# The dtypes of operands a, b and c, and of the 0-dim tensor v.
SIGNATURES = {
    "float32": (F32, F32, F32, F32),
    "float64": (F64, F64, F64, F64),
    "bfloat16": (BF16, BF16, BF16, F32),
    "float16": (F16, F16, F16, F32),
    "float32 with bfloat16": (F32, BF16, F32, F64),
    "float64 with float32": (F64, F32, F64, F32),
    "bfloat16 with float16": (BF16, F16, BF16, F64),
}
NUMBERS = ((0.1234567, 0.7654321), (-1.7, -3.3), (2.5, 1e-3), (0.9, float("inf")))  # s and v
SIZES = (70_003, *range(1, 70))

vectorized_aten = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="ATen's kernels for other processors fuse other products and sums",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """ATen's threads get sizes of their own, with tails of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def launch(
    kernel: Kernel,
    lists: Mapping[str, Sequence[Tensor]],
    scalars: Mapping[str, float] | None = None,
    values: Mapping[str, Tensor] | None = None,
    threads: int = 1,
) -> None:
    """Run a kernel in place on a list of tensors per operand."""
    operands, given, read = kernel.program.operands, scalars or {}, values or {}
    sizes = array("q", [t.numel() for t in lists[operands[0].name]])
    first_chunk = array("q", [0])
    for size in sizes:
        first_chunk.append(first_chunk[-1] - -size // CHUNK)
    kernel(
        array("Q", [t.data_ptr() for node in operands for t in lists[node.name]]),
        sizes,
        first_chunk,
        [given[node.name] for node in kernel.program.scalars],
        [read[node.name].data_ptr() for node in kernel.program.values],
        threads,
    )


def sample(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Values of many magnitudes; one in eight is a zero, denormal, infinite, NaN or extreme."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, size, dtype=F64, generator=generator)
    values = (draw() * torch.exp(4 * draw())).to(dtype)
    info = torch.finfo(dtype)
    special = [0.0, float("inf"), float("nan"), info.tiny / 4, info.tiny, info.max, 1.0, 2.0]
    chosen = torch.randint(8, (size,), generator=generator)
    signs = torch.randint(2, (size,), generator=generator) * 2 - 1
    at = torch.randint(8, (size,), generator=generator) == 0
    return torch.where(at, torch.tensor(special, dtype=dtype)[chosen] * signs, values)


def unequal(a: Tensor, b: Tensor) -> Tensor:
    """Where bits differ; any two NaNs are equal."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert a.dtype == b.dtype
    return (a.view(bits) != b.view(bits)) & ~(a.isnan() & b.isnan())


@functools.cache
def results(signature: str) -> dict[str, str]:
    """The operand that takes each case's result; torch has no lerp of unlike dtypes."""
    alike = len(set(SIGNATURES[signature][:3])) == 1
    names = [name for name in CASES if alike or not name.startswith("lerp")]
    return {name: f"result{index}" for index, name in enumerate(names)}


@functools.cache
def kernel_of_cases(signature: str) -> Kernel:
    """One kernel that stores what every case gives, in the dtype that it has."""
    dtypes = dict(zip("abcv", SIGNATURES[signature], strict=True))
    inputs, value = {name: dtypes[name] for name in "abc"}, {"v": dtypes["v"]}
    stored = results(signature)

    def build(a: Proxy, b: Proxy, c: Proxy, s: Proxy, v: Proxy, **_: Proxy) -> dict[str, Proxy]:
        return {operand: CASES[name](a, b, c, s, v) for name, operand in stored.items()}

    probe = program(build, inputs, {"s": 1.0}, value)
    outputs = {k: dtype_of(n) for k, n in zip(probe.stored, probe.results, strict=True)}
    return Kernel(program(build, inputs | outputs, {"s": 1.0}, value))


@functools.cache
def outcomes(signature: str, padded: bool) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """For each case what the kernel and what eager give, for all sizes and numbers.

    Args:
        signature: one of ``SIGNATURES``.
        padded: whether eager gets more elements than are compared, so that none is in the scalar
            tail of ATen's vectorized loop.
    """
    kernel = kernel_of_cases(signature)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in results(signature)}
    for (s, v), size in itertools.product(NUMBERS, SIZES):
        values = {"v": torch.tensor(v, dtype=SIGNATURES[signature][3])}
        room = -(-size // 64) * 64 if padded else size
        tensors = {
            node.name: sample(room, dtype_of(node), seed=room + index)
            if node.name in "abc"
            else torch.zeros(room, dtype=dtype_of(node))
            for index, node in enumerate(kernel.program.operands)
        }
        expected = run_eager(kernel.program, tensors, {"s": s}, values)
        launch(kernel, {name: [t[:size]] for name, t in tensors.items()}, {"s": s}, values)
        for name, operand in results(signature).items():
            found[name].append((tensors[operand][:size], expected[operand][:size]))
    return found


@vectorized_aten
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("case", CASES)
def test_operation_rounds_as_eager(case: str, signature: str, padded: bool) -> None:
    if case not in results(signature):
        pytest.skip("torch refuses these dtypes")
    if not padded and case in UNLIKE_TAILS[SIGNATURES[signature][0] in HALF]:
        pytest.skip("ATen rounds otherwise in the tail of its vectorized loop")
    for actual, expected in outcomes(signature, padded)[case]:
        if case in CLOSE | LAST_PLACE and actual.dtype not in HALF:
            # Observed: 2.1e-7 in float32 and 3.3e-16 in float64; of denormals, and of what softplus
            # divides by 0.1 next to them, 1.3e-44 and 4.4e-323.
            rtol, atol = (2.4e-7, 2e-44) if actual.dtype == F32 else (4.5e-16, 1e-320)
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
        elif case in LAST_PLACE:
            eps = torch.finfo(actual.dtype).eps
            torch.testing.assert_close(actual, expected, rtol=eps, atol=0, equal_nan=True)
        else:
            assert not unequal(actual, expected).any()


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_rounded_to_the_nearest_and_to_even(dtype: torch.dtype) -> None:
    kernel = Kernel(
        program(
            lambda wide, half, **_: {
                "narrowed": aten._to_copy.default(wide, dtype=dtype),
                "rounded": aten._to_copy.default(
                    aten._to_copy.default(wide, dtype=dtype), dtype=F32
                ),
                "widened": aten._to_copy.default(half, dtype=F32),
            },
            {"wide": F32, "half": dtype, "narrowed": dtype, "rounded": F32, "widened": F32},
        )
    )
    every = torch.arange(2**16, dtype=torch.int64)
    for low in (0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF):
        tensors = {
            "wide": (every << 16 | low).to(torch.int32).view(F32),
            "half": every.to(torch.int16).view(dtype),
            "narrowed": torch.empty(2**16, dtype=dtype),
            "rounded": torch.empty(2**16),
            "widened": torch.empty(2**16),
        }
        expected = run_eager(kernel.program, tensors)
        launch(kernel, {name: [tensor] for name, tensor in tensors.items()})
        assert not any(unequal(tensors[name], want).any() for name, want in expected.items())


SHAPES = (0, 1, 15, 16, 17, 0, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5, 0)


def adamw_lists(dtype: torch.dtype, offset: int = 0) -> dict[str, list[Tensor]]:
    """Operands of SHAPES elements, ``offset`` elements into their storage."""
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    lists = {
        name: [torch.randn(n + offset + 1).to(dtype)[offset:-1] for n in SHAPES] for name in names
    }
    lists["exp_avg_sq"] = [t.abs_() for t in lists["exp_avg_sq"]]
    return lists


@vectorized_aten
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_adamw_has_the_bits_of_eager(dtype: torch.dtype, offset: int, threads: int) -> None:
    kernel = Kernel(adamw(dtype))
    lists = adamw_lists(dtype, offset)
    values = {"norm": torch.tensor(3.7, dtype=F64 if dtype == F64 else F32)}
    step = functools.partial(run_eager, kernel.program, scalars=ADAMW_SCALARS, values=values)
    expected = [step({k: ts[i] for k, ts in lists.items()}) for i in range(len(SHAPES))]
    gradients = [t.clone() for t in lists["grad"]]
    launch(kernel, lists, ADAMW_SCALARS, values, threads)
    for index, stored in enumerate(expected):
        assert not unequal(lists["grad"][index], gradients[index]).any()
        for name, want in stored.items():
            assert not unequal(lists[name][index], want).any()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "shapes",
    [
        SHAPES,
        ((RUN + 1) * CHUNK + 5, 2 * RUN * CHUNK, CHUNK + 1),  # runs end within tensors
        (*[70] * RUN, 0, 2 * CHUNK, *[0] * RUN, *[3] * (RUN + 3), 0),  # and between them
    ],
)
def test_each_element_is_reached_once_and_nothing_beside(
    shapes: tuple[int, ...], threads: int
) -> None:
    kernel = Kernel(program(lambda a: {"a": aten.add.Tensor(a, 1.0)}, {"a": F32}))
    whole = [torch.zeros(n + 2) for n in shapes]
    launch(kernel, {"a": [t[1:-1] for t in whole]}, threads=threads)
    for tensor in whole:
        assert tensor[0] == tensor[-1] == 0
        assert (tensor[1:-1] == 1).all()


def test_results_are_stored_after_all_operands_are_read() -> None:
    """Two operands change places, and take on each other's dtypes."""
    kernel = Kernel(program(lambda a, b: {"a": b, "b": a}, {"a": F32, "b": F64}))
    a, b = torch.randn(1000), torch.randn(1000, dtype=F64)
    expected = b.float(), a.double()
    launch(kernel, {"a": [a], "b": [b]})
    assert torch.equal(a, expected[0])
    assert torch.equal(b, expected[1])


def test_no_tensors() -> None:
    kernel = Kernel(program(lambda a: {"a": aten.neg.default(a)}, {"a": F32}))
    launch(kernel, {"a": []}, threads=2)
    single = [torch.ones(3)]
    launch(kernel, {"a": single}, threads=2)
    assert single[0].tolist() == [-1.0] * 3


@pytest.mark.parametrize(
    ("build", "dtype", "named"),
    [
        (lambda a: {"a": aten.lgamma.default(a)}, F32, "aten.lgamma"),
        (lambda a: {"a": aten.cumsum.default(a, 0)}, F32, "aten.cumsum"),
        (lambda a: {"a": aten.neg.default(a)}, torch.int64, "torch.int64"),
        (
            lambda a: {"a": aten.neg.default(aten._to_copy.default(a, dtype=torch.complex64))},
            F32,
            "complex64",
        ),
        (lambda a: {"a": aten.add.Tensor(a, 1j)}, F32, "complex64"),
    ],
)
def test_what_has_no_code_is_refused(
    build: Callable[[Any], dict[str, Any]], dtype: torch.dtype, named: str
) -> None:
    with pytest.raises(UnsupportedError, match=named):
        Kernel(program(build, {"a": dtype}))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native_build.CompilerError, match="no-such-compiler"):
        Kernel(program(lambda a: {"a": aten.mul.Tensor(a, 0.31415)}, {"a": F32}))


def test_kernel_keeps_its_program() -> None:
    made: Program = program(lambda a: {"a": aten.neg.default(a)}, {"a": F32})
    assert Kernel(made).program is made
