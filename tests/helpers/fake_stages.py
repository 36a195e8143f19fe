"""Replaces the stages of benchmarks/gpu.py by short programs."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu

STAGE = f"""
import sys
sys.path.insert(0, {str(Path(gpu.__file__).parent)!r})
from gpu_stages.stage import main
def run(stage):
    {{body}}
main('{{name}}', run)
"""


def fake_stages(bodies: dict[str, str]) -> Callable[..., list[str]]:
    """Return a `gpu.command_of` for stages whose code is in `bodies`, by name."""
    command_of = gpu.command_of

    def fake_command_of(name: str, step: Any, seconds: float, args: argparse.Namespace) -> list[str]:
        code = STAGE.format(body=bodies[name], name=name)
        return [sys.executable, '-c', code, *command_of(name, step, seconds, args)[3:]]

    return fake_command_of
