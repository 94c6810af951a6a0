"""Generated code as it is now, to see what a change changes: ``python tests/golden.py`` renews it.

For three optimizers in float32: the operations that were recorded, their graph with norm and scale
inserted, the C++ and the Triton source.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from optimizer_registry import maker

from compileclip.lowering.cpp import cpp_kernel, cpp_prelude
from compileclip.lowering.triton import triton_source
from compileclip.passes.insert_norm_and_scale import InsertNormAndScale
from compileclip.recording.program_builder import Kind, assemble
from compileclip.recording.recorder import record
from compileclip.recording.shadow import OnDevice, Shadow

FOLDER = Path(__file__).parent / "golden"
OPTIMIZERS = {
    "sgd": maker("SGD, momentum", lr=0.1),
    "adamw": maker("AdamW", lr=1e-3),
    "nadam": maker("NAdam", lr=1e-3),
}
FLOAT = torch.float32


def generated(name: str, on_device: bool) -> Iterator[tuple[str, str]]:
    """The names of files, and what is in them, for step counts on the host or on the device."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS[name]([p])
    p.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state[p]
    dtypes = {"param": FLOAT, "grad": FLOAT, **{k: FLOAT for k, v in state.items() if v.dim()}}
    counts = {k: v.dtype for k, v in state.items() if not v.dim()}
    there = OnDevice(torch.device("cuda"), counts, {}) if on_device else None
    before = {} if on_device else {k: v.clone() for k, v in state.items() if not v.dim()}
    shadow = Shadow(optimizer, dtypes, on_device=there)
    recording = record(shadow, optimizer.param_groups[0], before)
    kind = Kind(InsertNormAndScale(norm_type=2.0), FLOAT, finite=on_device)
    program = assemble(recording, dtypes, kind)
    if on_device:
        yield f"{name}.triton.txt", triton_source.source(program).text
        return
    yield f"{name}.recorded.txt", "\n".join(map(str, recording.calls))
    yield f"{name}.inserted.txt", f"{program.graph}\n"
    # What all begin with is there once, in cpp_prelude.py.
    source = cpp_kernel.source(program)
    assert cpp_prelude.PRELUDE in source
    yield f"{name}.cpp", source.replace(cpp_prelude.PRELUDE, "// PRELUDE\n")


def all_files() -> dict[str, str]:
    """Every file's content by its name."""
    return {
        file: "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
        for name in OPTIMIZERS
        for on_device in (False, True)
        for file, text in generated(name, on_device)
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in all_files().items():
        (FOLDER / file).write_text(text)
