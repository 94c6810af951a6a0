"""What a user installs: the wheel's files, and an import that costs what importing torch costs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import compileclip
import compileclip.passes

ROOT = Path(__file__).parent.parent


def python(code: str, *paths: Path) -> str:
    """Run ``code`` in a fresh interpreter outside the checkout."""
    prelude = f"import sys; sys.path[:0] = {[str(p) for p in paths]!r}\n"
    command = [sys.executable, "-c", prelude + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_editable_install_has_the_passes() -> None:
    assert Path(compileclip.passes.__file__).parent == ROOT / "passes"
    assert python("import compileclip.passes as p; print(p.__name__)") == "compileclip.passes\n"


def test_wheel_has_all_and_works(tmp_path: Path) -> None:
    source = tmp_path / "source"  # setuptools writes its build folder beside pyproject.toml
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("compileclip-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    whole = source / "compileclip"
    modules = {str(p.relative_to(source)) for p in whole.rglob("*") if p.is_file()}
    modules |= {f"compileclip/passes/{p.name}" for p in (source / "passes").iterdir()}
    assert {n for n in names if not n.split("/")[0].endswith(".dist-info")} == modules
    assert "compileclip/py.typed" in modules
    assert any(n.endswith("LICENSE") for n in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import compileclip, compileclip.passes as p; print(compileclip.__file__, p.__file__)"
    for place in python(code, tmp_path / "site").split():
        assert place.startswith(str(tmp_path / "site"))


def test_gpu_tests_do_without_expecttest() -> None:
    """What torch's tests alone need is not installed on every GPU machine."""
    code = "import pytest; sys.modules['expecttest'] = None\n"
    code += f"options = ['--collect-only', '-qq', '-m', 'gpu', '--rootdir', {str(ROOT)!r}]\n"
    code += f"sys.exit(pytest.main([*options, '-p', 'no:cacheprovider', {str(ROOT / 'tests')!r}]))"
    assert "tests/multi_tensor/test_gpu.py" in python(code)


def test_import_loads_no_compiler() -> None:
    """Whatever ``import torch`` alone does not load: triton, inductor, dynamo, tabulate..."""
    code = "import torch; before = set(sys.modules); import compileclip\n"
    code += (
        "print(*sorted(m for m in set(sys.modules) - before if not m.startswith('compileclip')))"
    )
    extra = python(code).split()
    allowed = {"torch.utils._foreach_utils"}
    assert set(extra) <= allowed, extra


def test_public_names() -> None:
    assert set(compileclip.__all__) == {
        "ClippedOptimizer",
        "FallbackWarning",
        "clipped",
        "compile",
        "clip_grad_norm_",
        "clip_grad_value_",
        "clip_grads_with_norm_",
        "get_total_norm",
        "wrap",
    }
    assert all(getattr(compileclip, name).__doc__ for name in compileclip.__all__)
    assert f'version = "{compileclip.__version__}"' in (ROOT / "pyproject.toml").read_text()
