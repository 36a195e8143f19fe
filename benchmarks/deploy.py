#!/usr/bin/env python
"""Time and error of the forms of a network that serve on a CPU: fused, compiled, ONNX Runtime, OpenVINO, bfloat16.

    python benchmarks/deploy.py --output results/deploy.md   # the table of docs/deploy.md
    python benchmarks/deploy.py --forms fuse bfloat16 --threads 1
    python benchmarks/deploy.py --models resnet18 atac_resnet18 --batch-size 1

All forms of all models take turns in every round. A ratio is the median (range) over the rounds, of a model's time over
that of the first model in the same form. A difference is the largest one from the model in float64, over its largest
output. Weights are random, and so are the images: int8 loses more with trained weights. ONNX Runtime and OpenVINO are
optional; a form whose library is missing is listed with the reason (`pip install '.[deploy]'` installs both).
"""

import argparse
import copy
import importlib.metadata
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn as nn
from measuring.serving import FORMS, Run, Setting, largest_difference, with_trained_norms
from measuring.timing import Spread, device_name, interleaved, ratio

CPU = torch.device('cpu')
LIBRARIES = ('torch', 'timm', 'onnx', 'onnxruntime', 'openvino')


class Built(NamedTuple):
    """The forms that were built, and why the others were not.

    Args:
        runs: By form and model, what runs the model in that form.
        differences: By form and model, the largest difference from float64.
        skipped: By form, the library that is missing.
        failed: By form, the error.
    """

    runs: dict[tuple[str, str], Run]
    differences: dict[tuple[str, str], float]
    skipped: dict[str, str]
    failed: dict[str, str]


def build(models: Mapping[str, nn.Module], forms: list[str], images: torch.Tensor, threads: int, folder: Path) -> Built:
    """Build each form of each model, and compare its output with the model in float64.

    Args:
        models: Models in `eval()` mode, by name.
        forms: Keys of `FORMS`.
        images: Images (B, C, H, W) in float32, contiguous.
        threads: Threads of each form.
        folder: An empty folder for exported files.
    """
    with torch.no_grad():
        exact = {name: copy.deepcopy(model).double()(images.double()) for name, model in models.items()}
    built = Built({}, {}, {}, {})
    for form in forms:
        runs, differences = {}, {}
        try:
            for name, model in models.items():
                here = folder / form / name
                here.mkdir(parents=True)
                runs[form, name] = FORMS[form].build(model, Setting(images, here, threads))
                differences[form, name] = largest_difference(runs[form, name], exact[name])
        except ImportError as error:
            built.skipped[form] = str(error)
        except Exception as error:  # hours of other forms must not be lost
            (line, *_) = str(error).strip().splitlines() or ['']
            built.failed[form] = f'{type(error).__name__}: {line}'
        else:
            built.runs.update(runs)
            built.differences.update(differences)
    return built


def table(built: Built, names: list[str], rounds: int) -> list[str]:
    """Measure all forms and return the lines of a Markdown table, with those that were not built below it."""
    labels = {key: ', '.join(key) for key in built.runs}
    times = interleaved({labels[key]: run for key, run in built.runs.items()}, rounds, CPU)
    base = names[0]
    columns = ['form', 'memory layout', *(f'`{name}` (ms)' for name in names)]
    columns += [f'`{name}` over `{base}`' for name in names[1:]]
    columns += [f'largest difference, `{name}`' for name in names]
    lines = [f'| {" | ".join(columns)} |', f'|{" --- |" * len(columns)}']
    for form in dict.fromkeys(form for form, _ in built.runs):
        cells = [FORMS[form].label, FORMS[form].layout]
        cells += [f'{1e3 * Spread.of(times[labels[form, name]]).median:.1f}' for name in names]
        cells += [str(ratio(times, labels[form, name], labels[form, base])) for name in names[1:]]
        cells += [f'{built.differences[form, name]:.1e}' for name in names]
        lines.append(f'| {" | ".join(cells)} |')
    for title, reasons in (('Skipped', built.skipped), ('Failed', built.failed)):
        if reasons:
            lines += ['', *(f'- {title}: {FORMS[form].label} ({reason})' for form, reason in reasons.items())]
    return lines


def setting_line(batch: int, size: int, rounds: int) -> str:
    versions = []
    for library in LIBRARIES:
        try:
            versions.append(f'{library} {importlib.metadata.version(library)}')
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f'{processor()}, {device_name(CPU)}, batch {batch} at {size} px, medians of {rounds} rounds; '
        f'{", ".join(versions)}.'
    )


def processor() -> str:
    """Return the processor's name and its instructions for int8 and bfloat16, on Linux."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return 'unknown processor'
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(':') for line in lines)}
    fast = [name for name in ('avx512_vnni', 'avx512_bf16', 'amx_bf16', 'amx_int8') if name in fields.get('flags', '')]
    return ' '.join([fields.get('model name', 'unknown processor'), *([f'({", ".join(fast)})'] if fast else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet50', 'atac_resnet50'], help='names of timm')
    parser.add_argument('--forms', nargs='+', choices=FORMS, default=list(FORMS), metavar='FORM', help=', '.join(FORMS))
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--output', type=Path, metavar='FILE', help='also write the table to this Markdown file')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    if any('compile' in form for form in args.forms):
        # all models run the code of one class; by default, code that was compiled eight times runs eagerly from then on
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
    models = {name: with_trained_norms(timm.create_model(name), images) for name in args.models}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the exporters
        built = build(models, args.forms, images, args.threads, Path(folder))
        lines = [setting_line(args.batch_size, args.img_size, args.rounds), '']
        lines += table(built, args.models, args.rounds)
    text = '\n'.join(lines) + '\n'
    print(text, end='')
    if args.output:
        args.output.write_text(text)
    if built.failed:
        sys.exit(f'{len(built.failed)} of {len(args.forms)} forms failed')


if __name__ == '__main__':
    main()
