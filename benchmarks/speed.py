#!/usr/bin/env python
"""Time and memory of the ATAC networks relative to timm's, and time of the unit relative to a copy.

    python benchmarks/speed.py                                  # on a CPU: the tables of docs/speed.md
    python benchmarks/speed.py --what units                     # one of the tables
    python benchmarks/speed.py --mode compile --models resnet50 atac_resnet50
    python benchmarks/speed.py --device cuda --batch-size 256 --mode bf16 --rounds 30 --plot speed.png
    python benchmarks/speed.py --device cuda --batch-size 256 --mode half --what inference --kernels

All models, or all forms of a unit, take turns in every round. A ratio is the median (range) of all rounds.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn as nn
from measuring.checkpointed import CheckpointedATAC
from measuring.timing import Spread, bytes_kept, can_run_kernels, device_name, interleaved, peak_memory, ratio

import timm_atac
from timm_atac import ATAC, ATACMe, fuse

MODELS: dict[str, Callable[[], Any]] = {
    'resnet50': partial(timm.create_model, 'resnet50'),
    'atac_resnet50': partial(timm.create_model, 'atac_resnet50'),
    'atac_resnet50_full': partial(timm.create_model, 'atac_resnet50_full'),
    'seresnet50': partial(timm.create_model, 'seresnet50'),
    'ge_plus_resnet50': partial(timm.create_model, 'ge_plus_resnet50'),
    'aa_resnet50': partial(timm.create_model, 'aa_resnet50'),
    'fa_resnet50': partial(timm.create_model, 'fa_resnet50'),
    'resnet50, silu': partial(timm.create_model, 'resnet50', act_layer='silu'),
    'resnet50, prelu': partial(timm.create_model, 'resnet50', act_layer='prelu'),
    'atac_resnet50, plain': partial(timm.create_model, 'atac_resnet50', act_layer=ATAC),
    'atac_resnet50_full, plain': partial(timm.create_model, 'atac_resnet50_full', act_layer=ATAC),
    'atac_resnet50, checkpoint': partial(timm.create_model, 'atac_resnet50', act_layer=CheckpointedATAC),
    'atac_resnet50_full, checkpoint': partial(timm.create_model, 'atac_resnet50_full', act_layer=CheckpointedATAC),
}
FUSED = ('resnet50', 'atac_resnet50', 'atac_resnet50_full', 'seresnet50')
MODES = {  # channels_last, autocast to bfloat16, weights and images in bfloat16, torch.compile
    'eager': (False, False, False, False),
    'channels_last': (True, False, False, False),
    'bf16': (True, True, False, False),
    'half': (True, False, True, False),
    'compile': (True, False, False, True),
    'compile_bf16': (True, True, False, True),
    'compile_half': (True, False, True, True),
}
NETWORKS = ('atac_resnet50_full', 'atac_resnet8_cifar')
ODD = ((24, 17, 13), (96, 31, 29), (200, 7, 5))


class Mode(NamedTuple):
    """How models run: the fields are those of `MODES`, and the device."""

    channels_last: bool
    bf16: bool
    half: bool
    compiled: bool
    device: torch.device
    compile_mode: str = 'max-autotune-no-cudagraphs'  # only used on a GPU

    def prepare(self, module: Any) -> Any:
        module = module.to(self.device, torch.bfloat16 if self.half else None)
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)
        if self.compiled:
            return torch.compile(module, mode=self.compile_mode if self.device.type == 'cuda' else None)
        return module

    def tensor(self, *shape: int) -> torch.Tensor:
        x = torch.randn(shape, device=self.device, dtype=torch.bfloat16 if self.half else None)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


class Row(NamedTuple):
    name: str
    seconds: Spread
    over: Spread  # time over that of the first model
    peak: float  # bytes
    saved: float | None  # bytes for the backward pass


def inference(mode: Mode, names: list[str], batch: int, size: int, rounds: int, kernels: bool = False) -> list[Row]:
    """Measure a forward pass in `eval()` mode without gradients."""
    x = mode.tensor(batch, 3, size, size)
    runs: dict[str, Callable[[], object]] = {}
    for name in names:
        model = MODELS[name]().eval()
        forms = {name: model}
        if name in FUSED:
            forms[f'{name}, fused'] = fuse(model, kernel=False)
        if name in FUSED and kernels and _has_units(model):
            forms[f'{name}, fused, kernels'] = fuse(model, kernel=True)
        for label, module in forms.items():
            runs[label] = partial(_infer, mode, mode.prepare(module), x)
    times = interleaved(runs, rounds, mode.device)
    return [
        Row(label, Spread.of(times[label]), ratio(times, label, next(iter(runs))), peak_memory(run, mode.device), None)
        for label, run in runs.items()
    ]


def _has_units(model: nn.Module) -> bool:
    return any(isinstance(module, ATAC) for module in model.modules())


def _infer(mode: Mode, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), mode.autocast():
        return model(x)


def training(mode: Mode, names: list[str], batch: int, size: int, rounds: int, kernels: bool = False) -> list[Row]:
    """Measure forward pass, backward pass and a step of SGD with momentum."""
    x = mode.tensor(batch, 3, size, size)
    target = torch.arange(batch, device=mode.device) % 1000
    runs, saved = {}, {}
    for name in names:
        model = MODELS[name]().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        prepared = mode.prepare(model)
        # in training, a unit that is compiled or has norms in bfloat16 does not use the kernels
        has_kernels = kernels and any(isinstance(m, ATACMe) for m in model.modules())
        has_kernels = has_kernels and not mode.compiled and not mode.half
        for by_kernel in (False, True) if has_kernels else (False,):
            label = f'{name}, kernels' if by_kernel else name
            timm_atac.use_kernels(by_kernel)
            saved[label] = bytes_kept(partial(_forward, mode, prepared, x, target), model)
            timm_atac.use_kernels(None)
            runs[label] = partial(_step, mode, prepared, optimizer, x, target, by_kernel)
    times = interleaved(runs, rounds, mode.device)
    return [
        Row(name, Spread.of(times[name]), ratio(times, name, names[0]), peak_memory(run, mode.device), saved[name])
        for name, run in runs.items()
    ]


def _forward(mode: Mode, model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    with mode.autocast():
        return nn.functional.cross_entropy(model(x), target)


def _step(mode: Mode, model: nn.Module, optimizer: Any, x: torch.Tensor, target: torch.Tensor, by_kernel: bool) -> None:
    timm_atac.use_kernels(by_kernel)
    _forward(mode, model, x, target).backward()
    optimizer.step()
    optimizer.zero_grad()
    timm_atac.use_kernels(None)


def print_models(title: str, rows: list[Row], batch: int) -> None:
    print(f'\n{title}\n')
    first = rows[0]
    print(f'| model | images/s | time over {first.name} | peak memory (MB) | over | saved for backward (MB) | over |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    for row in rows:
        saved = '| |'
        if row.saved is not None and first.saved is not None:
            saved = f'{row.saved / 1e6:.1f} | {row.saved / first.saved:.3f} |'
        print(
            f'| {row.name} | {batch / row.seconds.median:.1f} | {row.over} | {row.peak / 1e6:.0f} '
            f'| {row.peak / first.peak:.2f} | {saved}'
        )


def shapes() -> list[tuple[int, int, int]]:
    """Return (C, H, W) of every unit of our networks at their default image sizes, and a few odd ones."""
    found: dict[tuple[int, int, int], None] = {}
    for name in NETWORKS:
        model: Any = timm.create_model(name, device='meta').eval()
        for module in model.modules():
            if isinstance(module, ATAC):
                module.register_forward_hook(lambda module, args, y: found.setdefault(tuple(y.shape[1:])))
        model(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))
    return [*found, *ODD]


def units(mode: Mode, batch: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return by shape and form: seconds, time over a copy, and GB/s (x read once, y written once)."""
    results: dict[str, dict[str, Any]] = {}
    for channels, height, width in shapes():
        torch.compiler.reset()  # forget the previous shape
        unit = ATAC(channels)
        memory_efficient = ATACMe(channels)
        memory_efficient.load_state_dict(unit.state_dict())
        x = mode.tensor(batch, channels, height, width)
        x = x.bfloat16() if mode.bf16 else x
        trained = {
            'ATAC, training': mode.prepare(unit).train(),
            'ATACMe, training': mode.prepare(memory_efficient).train(),
        }
        plain = ATAC(channels).eval()
        small = torch.zeros(2, channels, 2, 2)
        fused = fuse(plain, example_input=small, kernel=False)
        inferring = {'ReLU': mode.prepare(nn.ReLU()), 'ATAC': mode.prepare(plain), 'fused ATAC': mode.prepare(fused)}
        y = torch.empty_like(x)
        runs: dict[str, Callable[[], object]] = {'copy': partial(y.copy_, x)}
        runs |= {name: partial(_infer, mode, module, x) for name, module in inferring.items()}
        x_with_grad = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        runs |= {name: partial(_forward_backward, mode, module, x_with_grad, y) for name, module in trained.items()}
        times = interleaved(runs, rounds, mode.device, at_least=0.005)
        moved = 2 * x.numel() * x.element_size()
        results[f'{channels} x {height} x {width}'] = {
            name: (
                Spread.of(times[name]).median,
                ratio(times, name, 'copy'),
                moved / Spread.of(times[name]).median / 1e9,
            )
            for name in runs
        }
    return results


def _forward_backward(mode: Mode, module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
    with mode.autocast():
        y = module(x)
    y.backward(grad)
    x.grad = None
    module.zero_grad()


def print_units(results: dict[str, dict[str, Any]], batch: int) -> None:
    names = list(next(iter(results.values())))
    print(f'\nUnits, batch {batch}: ms, GB/s (x read once, y written once), and time over a copy\n')
    print(f'| C x H x W | {" | ".join(names)} |')
    print(f'|{" --- |" * (1 + len(names))}')
    for shape, forms in results.items():
        cells = [f'{1e3 * seconds:.3f}, {speed:.1f}, {over.median:.1f}' for seconds, over, speed in forms.values()]
        print(f'| {shape} | {" | ".join(cells)} |')


def plot(tables: dict[str, list[Row]], results: dict[str, dict[str, Any]], path: str, subtitle: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(tables) + bool(results)
    figure = Figure(figsize=(9, 3.6 * count), layout='constrained')
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    for axis, (title, rows) in zip(axes, tables.items(), strict=False):
        labels = [row.name for row in rows]
        medians = [row.over.median for row in rows]
        errors = [[row.over.median - row.over.low for row in rows], [row.over.high - row.over.median for row in rows]]
        axis.barh(labels, medians, xerr=errors, height=0.4, label='time')
        first = rows[0].saved
        if first is not None:
            axis.plot(
                [(row.saved or 0) / first for row in rows], labels, 'D', color='black', label='bytes saved for backward'
            )
        axis.axvline(1, color='grey', linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize='medium')
        axis.set_xlabel(f'over {rows[0].name}')
        axis.legend()
    if results:
        axis = axes[-1]
        for name in next(iter(results.values())):
            axis.plot(list(results), [forms[name][1].median for forms in results.values()], '.-', label=name)
        axis.set_yscale('log')
        axis.set_ylabel('time over a copy')
        axis.tick_params(axis='x', rotation=45)
        axis.legend(ncols=2, fontsize='small')
    figure.suptitle(subtitle, fontsize='small')
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--what', nargs='+', choices=('inference', 'training', 'units'), default=['inference', 'training', 'units']
    )
    parser.add_argument(
        '--models', nargs='+', choices=MODELS, default=list(MODELS), metavar='MODEL', help=', '.join(MODELS)
    )
    parser.add_argument('--mode', choices=MODES, default='channels_last')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument(
        '--kernels', action='store_true', help='also with the Triton kernels; kernels.py measures single units'
    )
    parser.add_argument('--plot', metavar='FILE', help='plot the ratios to this file')
    args = parser.parse_args()

    mode = Mode(*MODES[args.mode], device=torch.device(args.device))
    if args.kernels and not can_run_kernels(mode.device):
        parser.error(f'--kernels: no kernel runs on {args.device}; see benchmarks/kernels.py')
    # all models run the code of one class; by default, code that was compiled eight times runs eagerly from then on
    if mode.compiled:
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    setting = f'{device_name(mode.device)}, {args.mode}, batch {args.batch_size}, torch {torch.__version__}'
    print(setting)
    tables = {}
    for what, measure in (('inference', inference), ('training', training)):
        if what in args.what:
            tables[what] = measure(mode, args.models, args.batch_size, args.img_size, args.rounds, args.kernels)
            print_models(what.capitalize(), tables[what], args.batch_size)
    results = units(mode, args.batch_size, args.rounds) if 'units' in args.what else {}
    if results:
        print_units(results, args.batch_size)
    if args.plot:
        plot(tables, results, args.plot, setting)


if __name__ == '__main__':
    main()
