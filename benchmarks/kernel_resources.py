#!/usr/bin/env python
"""Registers, spills and shared memory of the Triton kernels, compiled for GPUs that this machine need not have.

    python benchmarks/kernel_resources.py              # compute capabilities 8.0 and 9.0
    python benchmarks/kernel_resources.py --capability 8.6 12.0 --dtype bfloat16 autocast

Spilled bytes are local memory of a thread that replaces missing registers. Triton compiles a kernel once for numbers of
positions that are divisible by 16 and once for others; a row has the maximum of both. With autocast, weights are in
bfloat16, and the input may be in float32. float32 is multiplied in TF32, or exactly (ieee).
"""

import argparse
import re
import subprocess
import tempfile
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
DTYPES = {  # dtypes of the weights and of the input
    'bfloat16': (torch.bfloat16, torch.bfloat16),
    'float16': (torch.float16, torch.float16),
    'float32': (torch.float32, torch.float32),
    'ieee': (torch.float32, torch.float32),
    'autocast': (torch.bfloat16, torch.float32),
}
# per multiprocessor, from CUDA's guide: KB of shared memory, of which a program may use one less, and warps
LIMITS = {80: (164, 64), 86: (100, 48), 87: (164, 48), 89: (100, 48), 90: (228, 64), 100: (228, 64), 120: (100, 48)}
_CUOBJDUMP = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'


class Resources(NamedTuple):
    registers: int  # per thread, at most 255
    spilled: int  # bytes per thread
    shared: int  # bytes per program
    warps: int

    def fits(self, capability: int) -> bool:
        return self.shared <= (LIMITS[capability][0] - 1) * 1024

    def warps_at_once(self, capability: int) -> int:
        """Return how many warps fit on a multiprocessor at once.

        It has 65,536 registers, which a warp gets in units of 256, and the shared memory in `LIMITS`.
        """
        memory, warps = LIMITS[capability]
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256 * self.warps)
        return min(warps // self.warps, by_registers, memory * 1024 // (self.shared + 1024)) * self.warps


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def compile(self, capability: int) -> Resources:
        """Return the maximum over both forms. A `capability` of 80 is compute capability 8.0."""
        found = [self._compile(capability, aligned) for aligned in (False, True)]
        return Resources(*(max(values) for values in zip(*found, strict=True)))

    def _compile(self, capability: int, aligned: bool) -> Resources:
        tensors = {name: arg for name, arg in self.arguments.items() if isinstance(arg, torch.Tensor)}
        constants = {name: arg for name, arg in self.arguments.items() if name.isupper()}
        signature = {name: 'constexpr' if name in constants else 'i32' for name in self.kernel.arg_names}
        signature |= {name: '*' + TYPES[t.dtype] for name, t in tensors.items()}
        sizes = [name for name in ('positions', 'area', 'share') if aligned and name in self.arguments]
        hints = {(self.kernel.arg_names.index(name),): [['tt.divisibility', 16]] for name in (*tensors, *sizes)}
        source = ASTSource(self.kernel, signature, constants, hints)
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
    """Return the launches of all operations by the kernel's name.

    Args:
        channels: Of the feature map.
        name: Of the dtypes in `DTYPES`.
        channels_last: Memory layout of the feature map.
        hidden: Hidden channels of the unit; half of the channels by default.
    """
    dtype, input_dtype = DTYPES[name]
    recorded: list[Launch] = []

    def record(wrapped: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        kernel = wrapped if hasattr(wrapped, 'arg_names') else wrapped.kernel
        names = {'num_warps', 'num_stages'} & constants.keys()
        options = {option: int(constants.pop(option)) for option in names}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | constants
        recorded.append(Launch(kernel, arguments, options))

    hidden = max(channels // 2, 1) if hidden is None else hidden
    x = torch.zeros(2, channels, 3, 3, dtype=input_dtype)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    z = x.to(dtype)
    parameters = [
        torch.zeros(shape, dtype=dtype) for shape in ((hidden, channels), hidden, (channels, hidden), channels)
    ]
    statistics = [torch.zeros(channels)] * 4

    def can_run(device: torch.device) -> bool:
        return True

    with (
        mock.patch.multiple(
            atac, run_kernel=record, can_run=can_run, _precision=lambda: 'ieee' if name == 'ieee' else 'tf32'
        ),
        mock.patch.multiple(norm_gate, run_kernel=record, can_run=can_run),
    ):
        atac.atac(x, *parameters)
        norm_gate.norm_gate(x, z, *statistics)
        norm_gate.norm_gate_sums(x, x, z, *statistics)
        norm_gate.norm_gate_backward(x, x, z, *statistics, torch.zeros(2, channels))
    return {launch.kernel.__name__: launch for launch in recorded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--capability', nargs='+', default=['8.0', '9.0'])
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=['bfloat16', 'float32', 'ieee', 'autocast'])
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
                    found = {c: launch.compile(c) for c in capabilities}
                    cells = [f'{r.registers}, {r.spilled}, {r.shared / 1024:.1f}' for r in found.values()]
                    at_once = [r.warps_at_once(capability) for capability, r in found.items()]
                    cells = [f'{cell}, {warps}' for cell, warps in zip(cells, at_once, strict=True)]
                    tile = ' x '.join(str(n) for key, n in launch.arguments.items() if key.endswith('_TILE'))
                    where = 'channels_last' if channels_last else 'contiguous'
                    print(f'| {name} | {channels} | {dtype} | {where} | {tile} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
