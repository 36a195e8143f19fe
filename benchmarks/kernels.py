#!/usr/bin/env python
"""Compare the Triton kernels with other implementations of a unit: times, bytes per second, errors. Needs a GPU.

    python benchmarks/kernels.py                  # inference, training and errors, at the shapes of our networks
    python benchmarks/kernels.py --what inference --shapes 64x56x56 256x14x14 --dtype float16 --plot kernels.png
    python benchmarks/speed.py --device cuda --batch-size 256 --mode half --what inference --kernels  # networks

Inference runs as CUDA graphs on several copies of the input, which together are larger than the GPU's cache. Training
runs eagerly. The forms of a shape take turns in every round. A share is relative to the bytes per second of a copy of
the same map in the same round. In float32, convolutions and the kernel multiply in TF32 by default; the matrix products
of 'folded' do not. kernel_tiles.py finds the fastest tiles. kernel_resources.py prints the resources of the kernels and
needs no GPU.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from measuring.timing import Spread, as_cuda_graph, can_run_kernels, device_name, interleaved, ratio
from speed import shapes

import timm_atac
from timm_atac import ATAC, ATACMe, fuse

FORMS = ('eager', 'folded', 'compiled', 'max-autotune', 'kernel')
TRAINED = ('ATAC', 'compiled', 'ATACMe', 'ATACMe, kernels')
CACHE = 256e6  # bytes, more than the cache of any GPU
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
Shape = tuple[int, int, int]
Results = dict[str, dict[str, list[float]]]  # seconds of each round, by shape and form


class Setting(NamedTuple):
    """Device, dtype, memory layout, batch size, rounds and shapes of the measurements."""

    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format
    batch: int
    rounds: int
    shapes: list[Shape]

    def __str__(self) -> str:
        layout = 'channels_last' if self.layout == torch.channels_last else 'contiguous'
        dtype = str(self.dtype).removeprefix('torch.')
        return f'{device_name(self.device)}, {dtype}, {layout}, batch {self.batch}, torch {torch.__version__}'

    def feature_map(self, shape: Shape) -> torch.Tensor:
        x = torch.randn(self.batch, *shape, device=self.device, dtype=self.dtype)
        return x.contiguous(memory_format=self.layout)

    def measure(self, runs: dict[Any, Callable[[torch.Tensor], object]], x: torch.Tensor) -> dict[Any, list[float]]:
        """Return the seconds per call of each round, by name."""
        cuda = self.device.type == 'cuda'
        copies = min(512, max(1, round(CACHE / (x.numel() * x.element_size())))) if cuda else 1
        inputs = [x.clone(memory_format=torch.preserve_format) for _ in range(copies)]
        pool = torch.cuda.graph_pool_handle() if cuda else None

        def run_all(run: Callable[[torch.Tensor], object]) -> list[object]:
            return [run(t) for t in inputs]  # a list, so that each result is written to other memory

        graphs = {name: as_cuda_graph(partial(run_all, run), self.device, pool) for name, run in runs.items()}
        times = interleaved(graphs, self.rounds, self.device, at_least=0.02)
        return {name: [seconds / copies for seconds in values] for name, values in times.items()}


def unit_for(channels: int) -> Any:
    """Return a unit whose norms have random weights and biases."""
    unit: Any = ATAC(channels)
    for norm in (unit.bn1, unit.bn2):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias)
    return unit


def forms(unit: ATAC, names: Sequence[str], setting: Setting) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return functions that compute a unit's inference in several forms. `unit` is not changed."""
    small = torch.zeros(2, unit.channels or 0, 2, 2)
    runs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for name in names:
        module: Any = copy.deepcopy(unit).eval()
        if name != 'eager':
            module = fuse(module, example_input=small, kernel=name == 'kernel')
        module = module.to(setting.device, setting.dtype, memory_format=setting.layout)
        if name == 'compiled':
            module = torch.compile(module)
        elif name == 'max-autotune':
            module = torch.compile(module, mode='max-autotune-no-cudagraphs')
        runs[name] = partial(infer, module)
    return runs


def infer(module: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x)


def inference(setting: Setting, shape: Shape, names: Sequence[str]) -> dict[str, list[float]]:
    torch.compiler.reset()
    x = setting.feature_map(shape)
    runs: dict[str, Callable[[torch.Tensor], object]] = {'copy': clone}
    return setting.measure(runs | forms(unit_for(shape[0]), names, setting), x)


def clone(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.preserve_format)


def training(setting: Setting, shape: Shape, names: Sequence[str], graphs: bool = False) -> dict[str, list[float]]:
    """Return the seconds of forward and backward pass of each round. Under autocast unless the dtype is float32.

    Args:
        setting: The setting.
        shape: (C, H, W) of the feature map.
        names: Names of the forms.
        graphs: True to time CUDA graphs, which excludes Python; False to time calls, as a training loop makes them.
    """
    torch.compiler.reset()
    x, grad = setting.feature_map(shape), setting.feature_map(shape)
    plain = unit_for(shape[0]).train()
    memory_efficient: Any = ATACMe(shape[0]).train()
    memory_efficient.load_state_dict(plain.state_dict())
    for unit in (plain, memory_efficient):
        unit.to(setting.device, memory_format=setting.layout)
    modules = {
        'ATAC': plain,
        'compiled': torch.compile(plain),
        'ATACMe': memory_efficient,
        'ATACMe, kernels': memory_efficient,
    }
    runs: dict[str, Callable[[], object]] = {'copy': partial(torch.empty_like(x).copy_, x)}
    x = x.detach().requires_grad_()
    runs |= {name: partial(_forward_backward, setting, name, modules[name], x, grad) for name in names}
    if graphs:
        runs = {name: as_cuda_graph(run, setting.device) for name, run in runs.items()}
    return interleaved(runs, setting.rounds, setting.device, at_least=0.02)


def _forward_backward(setting: Setting, name: str, module: Any, x: torch.Tensor, grad: torch.Tensor) -> None:
    timm_atac.use_kernels(name.endswith('kernels'))
    with torch.autocast(setting.device.type, setting.dtype, enabled=setting.dtype != torch.float32):
        y = module(x)
    y.backward(grad)
    x.grad = None
    module.zero_grad()
    timm_atac.use_kernels(None)


def errors(setting: Setting, channels: int, names: Sequence[str]) -> dict[str, float]:
    """Return the norm of each form's error over the norm of the result in float64.

    The error includes the rounding of the weights, but not of the input.
    """
    torch.compiler.reset()
    x = setting.feature_map((channels, 14, 14))
    unit = unit_for(channels).eval()
    exact = copy.deepcopy(unit).double()(x.double().cpu())
    found = {name: run(x).double().cpu() for name, run in forms(unit, names, setting).items()}
    return {name: ((y - exact).norm() / exact.norm()).item() for name, y in found.items()}


def print_inference(setting: Setting, names: Sequence[str]) -> Results:
    print('\nInference: us, GB/s (x read once, y written once), share of the copy\n')
    print(f'| C x H x W | copy: us, GB/s | {" | ".join(f"{name}: us, GB/s, share" for name in names)} |')
    print(f'|{" --- |" * (2 + len(names))}')
    results = {}
    for shape in setting.shapes:
        results[_name(shape)] = times = inference(setting, shape, names)
        moved = 2 * setting.batch * torch.Size(shape).numel() * setting.dtype.itemsize
        cells = []
        for name in ('copy', *names):
            median = Spread.of(times[name]).median
            share = f', {1 / ratio(times, name, "copy").median:.0%}'
            cells.append(f'{median * 1e6:.1f}, {moved / median / 1e9:.0f}{share if name in names else ""}')
        print(f'| {_name(shape)} | {" | ".join(cells)} |', flush=True)
    return results


def print_training(setting: Setting, names: Sequence[str]) -> Results:
    print('\nTraining, forward and backward pass: us, time over a copy\n')
    print(f'| C x H x W | {" | ".join(names)} |')
    print(f'|{" --- |" * (1 + len(names))}')
    results = {}
    for shape in setting.shapes:
        results[_name(shape)] = times = training(setting, shape, names)
        medians = {name: Spread.of(times[name]).median * 1e6 for name in names}
        cells = [f'{medians[name]:.1f}, {ratio(times, name, "copy").median:.1f}' for name in names]
        print(f'| {_name(shape)} | {" | ".join(cells)} |', flush=True)
    return results


def print_errors(setting: Setting, names: Sequence[str]) -> None:
    print('\nNorm of the error over the norm of the result in float64\n')
    print(f'| C | type | {" | ".join(names)} |')
    print(f'|{" --- |" * (2 + len(names))}')
    for channels in sorted({shape[0] for shape in setting.shapes}):
        for name, dtype in DTYPES.items():
            found = errors(setting._replace(dtype=dtype), channels, names)
            print(f'| {channels} | {name} | {" | ".join(f"{found[form]:.1e}" for form in names)} |', flush=True)


def _name(shape: Shape) -> str:
    return ' x '.join(map(str, shape))


def plot(results: Results, path: str, subtitle: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout='constrained')
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name in next(iter(results.values())):
        axis.plot(list(results), [ratio(times, name, 'copy').median for times in results.values()], '.-', label=name)
    axis.set(yscale='log', ylabel='time over a copy')
    axis.tick_params(axis='x', rotation=45)
    axis.legend(ncols=2, fontsize='small')
    figure.suptitle(subtitle, fontsize='small')
    figure.savefig(path, dpi=110)


def parse_setting(parser: argparse.ArgumentParser) -> tuple[Setting, argparse.Namespace]:
    """Add the common options to a parser and parse the command line. Exit with an error if the kernels cannot run."""
    parser.add_argument('--shapes', nargs='+', type=_shape, metavar='CxHxW', help='default: the shapes of our networks')
    parser.add_argument('--dtype', choices=DTYPES, default='bfloat16')
    parser.add_argument('--layout', choices=('channels_last', 'contiguous'), default='channels_last')
    parser.add_argument('--device', default='cuda', type=torch.device)
    parser.add_argument('--batch-size', type=int, default=256)
    parser.add_argument('--rounds', type=int, default=15)
    args = parser.parse_args()
    if not can_run_kernels(args.device):
        parser.error(
            f'no kernel runs on {args.device}: expected a GPU with compute capability 8.0 or newer, and PyTorch 2.7 or '
            f'newer with Triton. To try this program without a GPU, set TRITON_INTERPRET=1, and give --device cpu, '
            f'small shapes and a small batch. The times are then those of the interpreter.'
        )
    layout = torch.channels_last if args.layout == 'channels_last' else torch.contiguous_format
    setting = Setting(args.device, DTYPES[args.dtype], layout, args.batch_size, args.rounds, args.shapes or shapes())
    return setting, args


def _shape(text: str) -> Shape:
    channels, height, width = map(int, text.split('x'))
    return channels, height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = ('inference', 'training', 'errors')
    parser.add_argument('--what', nargs='+', choices=what, default=what)
    parser.add_argument('--forms', nargs='+', choices=FORMS, default=FORMS, help='forms of inference and of the errors')
    parser.add_argument('--trained', nargs='+', choices=TRAINED, default=TRAINED, help='forms of training')
    parser.add_argument('--plot', metavar='FILE', help='plot the times of inference to this file')
    setting, args = parse_setting(parser)
    print(setting)
    if 'inference' in args.what:
        results = print_inference(setting, args.forms)
        if args.plot:
            plot(results, args.plot, str(setting))
    if 'training' in args.what:
        print_training(setting, args.trained)
    if 'errors' in args.what:
        print_errors(setting, args.forms)


if __name__ == '__main__':
    main()
