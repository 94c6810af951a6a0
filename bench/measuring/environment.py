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
PACKAGES = ("torch", "triton")


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


def output_folder(out: Path | None, environment: dict[str, Any]) -> Path:
    """``out``, or the folder of this device among what is built."""
    name = environment["device_name"]
    if device_type(environment) == "cpu":
        name += f" {environment['threads']} threads"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return out or ROOT / "build" / "bench" / slug


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the checkout; with ``+`` where tracked files differ from it."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
