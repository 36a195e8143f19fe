#!/usr/bin/env python
"""What the Triton kernels take of a GPU, compiled here for one that need not be there: registers, spills, memory.

    python benchmarks/kernel_resources.py                          # compute capabilities 8.0 and 9.0
    python benchmarks/kernel_resources.py --capability 8.6 12.0 --dtype bfloat16 autocast

A spill is bytes of local memory that a thread has for registers that were not enough. Under autocast, weights are of
bfloat16, and the input may be of float32.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_atac.kernels import atac, norm_gate

CHANNELS = (16, 32, 64, 128, 256, 512, 1024, 2048)
TYPES = {torch.float16: 'fp16', torch.bfloat16: 'bf16', torch.float32: 'fp32'}
DTYPES = {  # of the weights, and of the input
    'bfloat16': (torch.bfloat16, torch.bfloat16),
    'float16': (torch.float16, torch.float16),
    'float32': (torch.float32, torch.float32),
    'autocast': (torch.bfloat16, torch.float32),
}
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a program may have, CUDA's guide
_CUOBJDUMP = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'


class Resources(NamedTuple):
    registers: int  # of a thread, 255 at most
    spilled: int  # bytes of a thread
    shared: int  # bytes of a program
    warps: int

    @property
    def warps_at_once(self) -> int:
        """How many of the 64 warps of a processor have registers: its 65,536 in portions of 256 a warp."""
        return min(64 // self.warps, 65536 // (-(-self.registers * 32 // 256) * 256 * self.warps)) * self.warps


class _Launcher:
    """Takes the place of a kernel, and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list['Launch']) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._keep

    def _keep(self, *args: Any, **kwargs: Any) -> None:
        options: dict[str, int] = {name: kwargs.pop(name) for name in ('num_warps', 'num_stages') if name in kwargs}
        arguments = dict(zip(self._kernel.arg_names, args, strict=False)) | kwargs
        self._launches.append(Launch(self._kernel, arguments, options))


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def compile(self, capability: int) -> Resources:
        """As for a GPU of a compute capability, 80 for 8.0."""
        tensors = {name: arg for name, arg in self.arguments.items() if isinstance(arg, torch.Tensor)}
        constants = {name: arg for name, arg in self.arguments.items() if name.isupper()}
        signature = {name: 'constexpr' if name in constants else 'i32' for name in self.kernel.arg_names}
        signature |= {name: '*' + TYPES[t.dtype] for name, t in tensors.items()}
        aligned = {(self.kernel.arg_names.index(name),): [['tt.divisibility', 16]] for name in tensors}
        source = ASTSource(self.kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=self.options)
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(compiled.asm['cubin'])
            file.flush()
            dump = [str(_CUOBJDUMP), '--dump-resource-usage', file.name]
            usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        found = re.search(r'REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)', usage)
        assert found is not None, usage
        registers, stack, local = map(int, found.groups())
        return Resources(registers, stack + local, compiled.metadata.shared, compiled.metadata.num_warps)


def launches(channels: int, name: str, channels_last: bool, hidden: int | None = None) -> dict[str, Launch]:
    """What each operation launches for a map of some channels and types of `DTYPES`, by the kernel's name."""
    dtype, input_dtype = DTYPES[name]
    kept: list[Launch] = []
    recorded: dict[str, Any] = {'launcher': lambda kernel: _Launcher(kernel, kept), 'can_run': lambda device: True}
    hidden = max(channels // 2, 1) if hidden is None else hidden
    x = torch.zeros(2, channels, 3, 3, dtype=input_dtype)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    z = x.to(dtype)
    parameters = [
        torch.zeros(shape, dtype=dtype) for shape in ((hidden, channels), hidden, (channels, hidden), channels)
    ]
    of_channels = [torch.zeros(channels)] * 4
    with mock.patch.multiple(atac, **recorded), mock.patch.multiple(norm_gate, **recorded):
        atac.atac(x, *parameters)
        norm_gate.norm_gate(x, z, *of_channels)
        norm_gate.norm_gate_sums(x, x, z, *of_channels)
        norm_gate.norm_gate_backward(x, x, z, *of_channels, torch.zeros(2, channels))
    return {launch.kernel.__name__: launch for launch in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--capability', nargs='+', default=['8.0', '9.0'])
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=['bfloat16', 'float32', 'autocast'])
    parser.add_argument('--channels', nargs='+', type=int, default=CHANNELS)
    args = parser.parse_args()
    capabilities = [int(text.replace('.', '')) for text in args.capability]
    cells = [f'{c / 10}: registers, spilled bytes, shared KB, warps at once' for c in capabilities]
    print(f'| kernel | C | type | layout | tile | {" | ".join(cells)} |')
    print(f'|{" --- |" * (5 + len(cells))}')
    for dtype in args.dtype:
        for channels_last in (True, False):
            for channels in args.channels:
                for name, launch in launches(channels, dtype, channels_last).items():
                    found = [launch.compile(capability) for capability in capabilities]
                    cells = [f'{r.registers}, {r.spilled}, {r.shared / 1024:.1f}, {r.warps_at_once}' for r in found]
                    tile = ' x '.join(str(n) for key, n in launch.arguments.items() if key.endswith('_TILE'))
                    where = 'channels_last' if channels_last else 'contiguous'
                    print(f'| {name} | {channels} | {dtype} | {where} | {tile} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
