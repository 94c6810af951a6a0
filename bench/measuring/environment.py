"""Where and with what was measured: it goes into every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "jax", "optax")


def describe(device: str) -> dict[str, Any]:
    """Device, threads, versions, commit and date."""
    return {
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def headline(environment: dict[str, Any]) -> str:
    """One line for people."""
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
    threads = environment["threads"]
    return (
        f"{environment['device_name']}, {threads} thread{'s' * (threads != 1)}, {versions}, "
        f"Python {environment['python']}, commit {environment['commit']}, {environment['date']}"
    )


def device_name(device: str) -> str:
    """What the hardware calls itself."""
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", lines, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def device_type(environment: dict[str, Any]) -> str:
    """Such as cpu or cuda."""
    return torch.device(environment["device"]).type


def slug(environment: dict[str, Any]) -> str:
    """A name for a folder of results of this device."""
    name = environment["device_name"]
    if device_type(environment) == "cpu":
        name += f" {environment['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the checkout; with ``+`` where tracked files differ from it."""
    hashed, changes = _git("rev-parse", "--short=10", "HEAD"), _git("status", "--porcelain", "-uno")
    return f"{hashed}{'+' if changes else ''}" if hashed else "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
