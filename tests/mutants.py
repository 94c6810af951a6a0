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

from mutant_table import MUTANTS

ROOT = Path(__file__).parent.parent


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
