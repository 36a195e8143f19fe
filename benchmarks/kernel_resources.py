#!/usr/bin/env python
"""What the Triton kernels take of a GPU, compiled here for one that need not be there: registers, spills, memory.

    python benchmarks/kernel_resources.py              # compute capabilities 8.0 and 9.0
    python benchmarks/kernel_resources.py --capability 8.6 12.0 --dtype bfloat16 autocast

A spill is bytes of local memory that a thread has for registers that were not enough. Triton compiles a kernel for
numbers of positions that 16 divides and again for others: a row has the most that one of them takes. Under autocast,
weights are of bfloat16, and the input may be of float32; float32 is multiplied in TF32, or exactly (ieee).
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
DTYPES = {  # of the weights, and of the input
    'bfloat16': (torch.bfloat16, torch.bfloat16),
    'float16': (torch.float16, torch.float16),
    'float32': (torch.float32, torch.float32),
    'ieee': (torch.float32, torch.float32),
    'autocast': (torch.bfloat16, torch.float32),
}
# of a processor, by CUDA's guide: KB of shared memory, of which a program may have one less, and warps
LIMITS = {80: (164, 64), 86: (100, 48), 87: (164, 48), 89: (100, 48), 90: (228, 64), 100: (228, 64), 120: (100, 48)}
_CUOBJDUMP = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'


class Resources(NamedTuple):
    registers: int  # of a thread, 255 at most
    spilled: int  # bytes of a thread
    shared: int  # bytes of a program
    warps: int

    def fits(self, capability: int) -> bool:
        return self.shared <= (LIMITS[capability][0] - 1) * 1024

    def warps_at_once(self, capability: int) -> int:
        """How many a processor has room for: in 65,536 registers, in portions of 256 a warp, and in shared memory."""
        memory, warps = LIMITS[capability]
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256 * self.warps)
        return min(warps // self.warps, by_registers, memory * 1024 // (self.shared + 1024)) * self.warps


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def compile(self, capability: int) -> Resources:
        """The most that any form takes, for a GPU of a compute capability, 80 for 8.0."""
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
    """What each operation launches for a map of some channels and types of `DTYPES`, by the kernel's name."""
    dtype, input_dtype = DTYPES[name]
    kept: list[Launch] = []

    def keep(wrapped: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        kernel = wrapped if hasattr(wrapped, 'arg_names') else wrapped.kernel
        names = {'num_warps', 'num_stages'} & constants.keys()
        options = {option: int(constants.pop(option)) for option in names}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | constants
        kept.append(Launch(kernel, arguments, options))

    hidden = max(channels // 2, 1) if hidden is None else hidden
    x = torch.zeros(2, channels, 3, 3, dtype=input_dtype)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    z = x.to(dtype)
    parameters = [
        torch.zeros(shape, dtype=dtype) for shape in ((hidden, channels), hidden, (channels, hidden), channels)
    ]
    of_channels = [torch.zeros(channels)] * 4

    def here(device: torch.device) -> bool:
        return True

    with (
        mock.patch.multiple(
            atac, run_kernel=keep, can_run=here, _precision=lambda: 'ieee' if name == 'ieee' else 'tf32'
        ),
        mock.patch.multiple(norm_gate, run_kernel=keep, can_run=here),
    ):
        atac.atac(x, *parameters)
        norm_gate.norm_gate(x, z, *of_channels)
        norm_gate.norm_gate_sums(x, x, z, *of_channels)
        norm_gate.norm_gate_backward(x, x, z, *of_channels, torch.zeros(2, channels))
    return {launch.kernel.__name__: launch for launch in kept}


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
