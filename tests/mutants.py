"""Break the code on purpose, one place at a time, and see the tests fail: ``make mutants``.

Each mutant replaces one piece of text in a copy of the checkout and runs the tests named beside it.
A mutant that survives is an error. (That half precision is scaled in float32 shows on a GPU only.)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICK = "tests/eager/test_functional.py tests/eager/test_functional_as_torch.py tests/wrapper/test_wrapper.py"

# (what, file, old text, new text, tests)
MUTANTS = [
    ("epsilon", "eager/reference.py", "+ 1e-6) * max", "+ 1e-5) * max", QUICK),
    ("clamp", "eager/reference.py", "torch.clamp(torch.reciprocal(total_norm + 1e-6) * max_norm, max=1.0)",
     "torch.reciprocal(total_norm + 1e-6) * max_norm", QUICK),
    ("order p of the last norm", "eager/reference.py",
     "torch.linalg.vector_norm(torch.stack(norms), norm_type)",
     "torch.linalg.vector_norm(torch.stack(norms), 2.0)", QUICK),
    ("float64 sums", "eager/reference.py", 'else torch.float64  # MPS',
     'else torch.float32  # MPS', "tests/eager/test_functional.py tests/eager/test_properties.py"),
    ("range of the sums", "eager/reference.py", "- 50\n", "+ 5000\n", QUICK),
    ("a coefficient of 1", "eager/reference.py", "scale.item() == 1.0", "scale.item() <= 1.0", QUICK),
    ("None filter", "eager/functional.py", "for p in parameters if p.grad is not None]",
     "for p in parameters]", QUICK),
    ("error before scaling", "eager/functional.py", "if not total_norm.isfinite():",
     "if False:", QUICK),
    ("None filter of the wrapper", "eager/eager_step.py", 'in group["params"] if p.grad is not None]',
     'in group["params"]]', "tests/wrapper/test_wrapper_gradients.py"),
    ("copy of the gradient", "eager/unhooked_step.py", "g.clone() for g in grads", "g for g in grads",
     "tests/wrapper/test_wrapper.py"),
    ("gradients put back", "eager/unhooked_step.py", "_set_grads(pairs, grads)", "pass",
     "tests/wrapper/test_wrapper_gradients.py"),
    ("pieces for foreign optimizers", "eager/unhooked_step.py",
     "_pieces(pairs) if is_torchs_own(optimizer) else [pairs]", "[[pair] for pair in pairs]",
     "tests/wrapper/test_wrapper.py"),
    ("quotient of the scales", "eager/eager_step.py", "divisor.reciprocal() if", "divisor if",
     "tests/wrapper/test_training.py tests/wrapper/test_amp.py"),
    ("unscaled norm", "eager/eager_step.py", "else norm / self.grad_scale", "else norm * self.grad_scale",
     "tests/wrapper/test_amp.py"),
    ("skip", "eager/eager_step.py", "norm))\n    return False", "norm))\n    return True",
     "tests/wrapper/test_nonfinite.py"),
    ("overflow on the host", "eager/eager_step.py", "if found_inf is not None and found_inf.item():",
     "if False:", "tests/wrapper/test_amp.py"),
    ("runs of chunks", "lowering/cpp/cpp_loop.py", "stop = start) {", "stop = start - 1) {",
     "tests/lowering/test_lowering_cpp.py"),
    ("the rest of a tensor", "lowering/cpp/cpp_loop.py", "std::min((last - chunk) * CHUNK, left)",
     "std::min((last - chunk) * CHUNK, left - 1)", "tests/lowering/test_lowering_cpp.py"),
    ("parameters noted as written", "native/native_tensors_source.py",
     "note_written(*torch, *torch->tensor(bucket->params[i]));", ";",
     "tests/wrapper/test_wrapper_gradients.py"),
    ("gradients noted as written", "native/native_tensors_source.py", "if (grads) note", "if (0) note",
     "tests/wrapper/test_wrapper_gradients.py"),
    ("versions by torch", "buckets/pointers.py", "[*params, *(p.grad for p in params if grads and",
     "[*(p.grad for p in params if grads and", "tests/buckets/test_buckets.py"),
    ("a factor in the tensor's dtype", "lowering/cpp/cpp_scale.py", "const T by = (T)factor;",
     "const float by = (float)factor;", "tests/lowering/test_scale_kernel.py"),
    ("where a thread's part ends", "lowering/cpp/cpp_scale.py", "most < sizes[i] ? most : sizes[i];",
     "sizes[i];", "tests/lowering/test_scale_kernel.py"),
    ("scaled tensors noted as written", "lowering/cpp/cpp_scale.py", "    increment_version(tensors)\n",
     "", "tests/lowering/test_scale_kernel.py"),
    ("each element scaled once", "lowering/cpp/cpp_scale.py",
     "if not contiguous and not all(map(plain_tensors.is_dense, tensors)):", "if False:",
     "tests/lowering/test_scale_kernel.py"),
    ("scale in a kernel", "recording/program_builder.py", "if kind.grad_scale:", "if False:", "tests/wrapper/test_amp.py"),
    ("counts of a step that does not count", "lowering/triton/triton_source.py",
     """[f"if {asked}:", *(f"    {line}" for line in lines)]""", "lines",
     "tests/multi_tensor/test_counts_on_the_device.py"),
    ("a step that does not count", "lowering/triton/triton_source.py",
     """[f"if {condition} == 0:", "    return"]""", "[]", "tests/multi_tensor/test_counts_on_the_device.py"),
    ("the factor of a GradScaler in a norm", "lowering/triton/triton_norm_kernels.py",
     "quotient(norm, scale.to(norm.dtype))", "norm", "tests/multi_tensor/test_counts_on_the_device.py"),
    ("a norm that nothing has ended", "multi_tensor/step_norm.py", "total = self._norm.end()",
     "total = self._norm.total", "tests/multi_tensor/test_multi_tensor_on_triton.py"),
    ("tensors that share memory", "lowering/triton/triton_foreach.py",
     "if not lists or not _are_apart(tensors):", "if not lists:",
     "tests/lowering/test_gpu_functions.py"),
    ("a reciprocal of float32", "lowering/triton/triton_code.py",
     'return f"inverse({variable(scalar)}, {triton_type(self.compute)})"',
     'return f"reciprocal({variable(scalar)}.to({triton_type(self.compute)}))"',
     "tests/lowering/test_aten_cuda.py"),
    ("skip of the first step", "eager/eager_step.py",
     "return all(optimizer.state.get(p) or p in stateless for p in grads.params)", "return True",
     "tests/wrapper/test_nonfinite.py"),
    ("found_inf of the scaler", "eager/eager_step.py",
     "grads.found_inf if fused else None",
     "None", "tests/wrapper/test_amp.py tests/wrapper/test_nonfinite.py"),
    ("state of the wrapped", "delegate.py", "return self.optimizer.state\n", "return {}\n",
     "tests/wrapper/test_wrapper.py tests/wrapper/test_training.py"),
    ("loading", "delegate.py", "self.optimizer.load_state_dict(state_dict)", "pass",
     "tests/wrapper/test_training.py"),
    ("pickled total norm and settings", "optimizer.py", 'self._settings = state["settings"]',
     "self._settings = ClipSettings(1.0)", "tests/wrapper/test_training.py"),
    ("hooks that are there", "delegate.py", "self._optimizer_step_pre_hooks\n            or ", "",
     "tests/wrapper/test_delegate.py"),
    ("a profiler that is on", "delegate.py", "torch._C._autograd._profiler_enabled()", "False",
     "tests/wrapper/test_delegate.py"),
    ("a formula's decisions", "recording/scalar_formula.py", "if decisions != self._decisions:", "if False:",
     "tests/recording/test_formula.py"),
    ("a formula's float32 counts", "recording/scalar_formula.py", "return ctypes.c_float(value).value",
     "return value", "tests/recording/test_formula.py"),
    ("formulas of any class", "buckets/bucket_step.py", "_FORMULAS if _is_closed(self._optimizer) else 0",
     "_FORMULAS", "tests/recording/test_formula.py"),
    ("shared hooks", "delegate.py", "self.__dict__[name] = value",
     "self.__dict__[name] = type(value)()", "tests/wrapper/test_wrapper.py"),
    ("write-back of a program", "recording/program_builder.py", "and (grads or name", "and (True or name",
     "tests/buckets/test_buckets.py"),
    ("state that was replaced", "native/native_tensors_source.py",
     "bucket.keys[k]) != bucket.kept[k * bucket.n + i])", "bucket.keys[k]) == 0)",
     "tests/buckets/test_bucket_layouts.py"),
    ("state that moved", "native/native_tensors_source.py",
     "if (!is_same(torch, bucket.kept[k * n + i],", "if (false && !is_same(torch, bucket.kept[k * n + i],",
     "tests/buckets/test_bucket_changes.py"),
    ("state that was resized", "native/native_tensors_source.py",
     "return compare(torch, tensor, shape) == SAME;", "return true;",
     "tests/wrapper/test_found_by_users.py"),
    ("layout of a gradient", "native/native_tensors_source.py", "status = LAYOUT;\n    empty",
     "status = SAME;\n    empty", "tests/buckets/test_bucket_layouts.py"),
    ("step counts", "buckets/bucket.py", "                buffer.fill_(value)", "                pass",
     "tests/buckets/test_bucket_changes.py"),
    ("gradient that came", "native/optimizer_unchanged_source.py", "have_grad(*torch, before->without, false)",
     "true", "tests/buckets/test_bucket_changes.py"),
    ("shared memory", "buckets/grouping.py", "if members and _overlap(params, optimizer):", "if False:",
     "tests/multi_tensor/test_bucket_refusals.py tests/multi_tensor/test_fuzz.py"),
    ("attributes of foreign optimizers", "recording/optimizer_attributes.py", "or is_data(value)):", "or True):",
     "tests/custom_optimizers/test_foreign_optimizers.py"),
    ("shapes that foreign optimizers ask for", "custom_optimizers/checks.py", "if not is_same(found,",
     "if False and not is_same(found,", "tests/custom_optimizers/test_foreign_steps.py"),
    ("parameters that Dynamo marks", "graph/backward_leaves.py",
     'return "unguarded" if kind == "guarded" and _thread.leaves is not None else kind',
     "return kind", "tests/graph/test_traced_parameters.py"),
    ("hooks of parameters", "graph/backward_leaves.py", "if leaves.hooked() or output.side_effects.tensor_hooks:",
     "if False:", "tests/graph/test_traced_refusals.py"),
    ("state of parameters without gradients", "eager/optimizer_state.py",
     "return {p for p, chosen in zip(params, among, strict=True) if chosen}", "return set(params)",
     "tests/graph/test_traced_parameters.py"),
    ("places that foreign optimizers ask for", "custom_optimizers/checks.py", "_equal(company.result(p), expected)",
     "True", "tests/custom_optimizers/test_foreign_steps.py"),
    ("what foreign optimizers count", "custom_optimizers/checks.py", "if not _equal(company.changes,",
     "if False and not _equal(company.changes,", "tests/custom_optimizers/test_foreign_steps.py"),
    ("groups without gradients", "multi_tensor/launching.py", "groups[index].update(changes)", "pass",
     "tests/custom_optimizers/test_foreign_steps.py"),
    ("numbers in state", "buckets/bucket.py", "and (not self.numbers or self._has_numbers())",
     "", "tests/custom_optimizers/test_foreign_steps.py"),
    ("attributes of parameters", "buckets/step_plan.py", "marks(self.params) != self._marks", "False",
     "tests/custom_optimizers/test_foreign_steps.py"),
    ("state of a step that does not count", "multi_tensor/fresh_state.py",
     "self._optimizer.state.pop(p, None)", "pass", "tests/multi_tensor/test_odd_state.py"),
    ("gradients over each other", "buckets/step_plan.py", "bool((ends[order][:-1] <= starts[order][1:]).all())",
     "True", "tests/multi_tensor/test_odd_state.py"),
    ("random numbers", "recording/recorder.py", "if torch.Tag.nondeterministic_seeded in func.tags:",
     "if False:", "tests/custom_optimizers/test_foreign_optimizers.py"),
    ("values that are not read", "recording/program_builder.py",
     "if isinstance(value, Tensor) and value.dim() == 0 and not node.users:",
     "if False:", "tests/buckets/test_buckets.py"),
    ("self-check", "multi_tensor/self_check.py", "if far.any() or", "if False or",
     "tests/multi_tensor/test_bucket_refusals.py"),
    ("a shape's scalars", "recording/recorder.py", "return done and numbers[0] == numbers[1]", "return done",
     "tests/multi_tensor/test_bucket_refusals.py"),
    ("chunk order of the norm", "lowering/cpp/cpp_norm_source.py", "result = join<max>(result, of_one)",
     "result = of_one", "tests/lowering/test_norm_kernel.py"),
    ("closure's grad mode", "optimizer.py", "with torch.enable_grad():", "with torch.no_grad():",
     "tests/wrapper/test_training.py"),
    ("what a trainer prepared", "wrappable.py",
     'if not hasattr(optimizer, "_optimizer_step_pre_hooks"):', "if False:",
     "tests/wrapper/test_accepted.py"),
    ("what unscales in its step", "wrappable.py", "if _unscales_in_its_step(optimizer):",
     "if False:", "tests/wrapper/test_accepted.py"),
    ("closures that are called again", "custom_optimizers/closure_calls.py", "if any(path.calls >= MANY for",
     "if any(False for", "tests/custom_optimizers/test_closures.py"),
    ("a step without its closure", "custom_optimizers/closure_calls.py", "if given and not without", "if False",
     "tests/custom_optimizers/test_closures.py"),
    ("norms that are alike", "double_clipping.py", "high - low > CLOSE * high", "False",
     "tests/wrapper/test_clipped_before.py"),
    ("the same gradients again", "double_clipping.py", "return low < high or", "return True or",
     "tests/wrapper/test_clipped_before.py"),
    ("pickled classes", "clipped.py", "copyreg.pickle(ClippedClass, _reduced)", "",
     "tests/wrapper/test_clipped.py"),
    ("one class for the same arguments", "clipped.py", "made = _classes.get((cls, settings))",
     "made = _made(cls, settings)", "tests/wrapper/test_clipped.py"),
    ("steps that compile", "custom_optimizers/side_effects.py", "if is_made or function is torch.compile:", "if False:",
     "tests/custom_optimizers/test_compiling_optimizers.py"),
    ("what a step writes outside", "custom_optimizers/side_effects.py", "for what in found.writes:", "for what in ():",
     "tests/custom_optimizers/test_nothing_leaks.py"),
    ("warnings of a trial", "recording/warning_steps.py", "    if cls.found:\n        raise",
     "    if False:\n        raise", "tests/custom_optimizers/test_nothing_leaks.py"),
    ("a step that a GradScaler no longer scales", "multi_tensor/native_step.py", "scaler or self._is_scaled",
     "scaler", "tests/multi_tensor/test_steady_on_a_stub.py tests/multi_tensor/test_steady_changes_on_a_stub.py"),
    ("addresses that a graph writes too", "multi_tensor/native_step_arguments.py",
     "is True, captured)", "is True, False)", "tests/multi_tensor/test_steady_on_a_stub.py"),
    ("memory that a step reads", "multi_tensor/native_step_arguments.py", "= [last, self.given]", "= [last]",
     "tests/multi_tensor/test_steady_fuzz.py"),
    ("versions of counts", "native/native_step_source.py", "!= uint32_t(count.version)) return",
     "== 77) return",
     "tests/multi_tensor/test_steady_on_a_stub.py tests/multi_tensor/test_steady_changes_on_a_stub.py"),
    ("a copy under way", "native/cuda_driver_source.py", "if (driver.query(slot->event) == 0) {",
     "if (true) {", "tests/multi_tensor/test_steady_on_a_stub.py"),
    ("lists that share memory", "native/native_foreach_source.py",
     "return list->writes && !are_apart(*list)", "return false", "tests/native/test_lists_on_a_stub.py"),
    ("memory that is copied on writing", "native/native_tensors_source.py",
     "return data == word(storage, torch.context);", "return true;", "tests/native/test_tensor_layout.py"),
    ("parts of other ranks", "validation.py", "if whose is not None:", "if False:",
     "tests/wrapper/test_refused_shards.py"),
    ("a bound in another key's place", "validation.py", "if not self._not_its_own.isdisjoint(group):",
     "if False:", "tests/wrapper/test_refusals.py"),
    ("an optimizer of some parameters", "validation.py", "filter(_SHARDING.__contains__, _callers())", "()",
     "tests/wrapper/test_refused_shards.py"),
    ("arrays as bounds", "settings.py", "or not isinstance(value, Real | torch.SymInt | torch.SymFloat)",
     "", "tests/wrapper/test_refusals.py"),
    ("gradients that a step writes", "eager/eager_step.py", "or _writes_gradients(optimizer))",
     "or False)", "tests/wrapper/test_found_by_users.py"),
    ("gradients of two parameters", "eager/eager_step.py", "torch.float32 and distinct and not",
     "torch.float32 and not", "tests/wrapper/test_found_by_users.py"),
    ("eager mode first", "multi_tensor/multi_tensor_step.py",
     "                if refused:\n                    step_others(refused)\n", "",
     "tests/multi_tensor/test_bucket_refusals.py"),
    ("state that nobody made", "buckets/bucket_step.py", "and (own or self.shadow.has_state)", "",
     "tests/wrapper/test_found_by_users.py"),
    ("settings that stay", "settings.py", "raise AttributeError(", "str(",
     "tests/wrapper/test_refusals.py"),
    ("layouts of fused kernels", "eager/memory_layout.py", "t.stride() == param.stride()", "True",
     "tests/eager/test_layouts.py"),
    ("fused again after an unfused step", "eager/memory_layout.py", 'group[name] = True', "pass",
     "tests/eager/test_layouts.py"),
    ("operations that are pointwise", "recording/pointwise_ops.py",
     "torch.Tag.pointwise in functional(func).tags", "True",
     "tests/custom_optimizers/test_foreign_optimizers.py tests/wrapper/test_reasons.py"),
    ("the same kinds of arguments", "recording/pointwise_ops.py", "and _kinds(found) == _kinds(func)", "",
     "tests/lowering/test_lowering_cpp.py tests/custom_optimizers/test_served_optimizers.py tests/eager/test_optim_db.py"),
    ("NaN in a maximum", "lowering/cpp/cpp_prelude.py", "OP maximum(T a, T b) { return a > b || a != a",
     "OP maximum(T a, T b) { return a > b", "tests/lowering/test_lowering_cpp.py"),
    ("the insertion left out of a program", "multi_tensor/eligibility.py", "if left_out is not None:",
     "if False:", "tests/passes/test_disabled_passes.py"),
    ("the insertion left out of a graph", "graph/inductor_mode.py", "if left_out is not None:",
     "if False:", "tests/passes/test_disabled_passes.py"),
    ("unknown passes", "graph/training_step.py", "    passes.disabled_passes()\n", "",
     "tests/passes/test_disabled_passes.py"),
    ("no cache without lifting", "graph/inductor_passes.py", "if not passes.may_be_cached():",
     "if False:", "tests/passes/test_disabled_passes.py"),
    ("halves rounded to even", "lowering/cpp/cpp_prelude.py", "b + 0x7fff + ((b >> 16) & 1)",
     "b + 0x8000", "tests/lowering/test_lowering_cpp.py"),
]  # fmt: skip


def survives(copy: Path, file: str, old: str, new: str, tests: str) -> bool:
    path = copy / "compileclip" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file}: {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))
    try:
        # The copy comes before the installed checkout, which still lends its passes.
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *tests.split()]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        # A process that crashes has noticed it, too.
        assert done.returncode <= 1, done.stdout + done.stderr
        return done.returncode == 0
    finally:
        path.write_text(text)


def main() -> int:
    """Run all mutants and print a line for each; return how many survived."""
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for what, file, old, new, tests in MUTANTS:
            survived = survives(copy, file, old, new, tests)
            survivors += survived
            print(f"{'SURVIVED' if survived else 'caught  '}  {file}: {what}", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} mutants caught")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
