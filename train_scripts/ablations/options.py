"""The command line options of `ablation.py`, and the runs that they select."""

import argparse
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import get_act_layer

from ablations.grid import (
    ACT_STAGES,
    ACTIVATIONS,
    BLOCKS,
    DATASETS,
    FIGURE_ACTIVATIONS,
    RECIPES,
    TABLE_ACTIVATIONS,
    Run,
    activation,
    canonical_name,
    default_recipe,
)
from ablations.trainer import COMPILE_FROM
from timm_atac.cli.parser import Parser
from timm_atac.utils.words import did_you_mean


def create_parser(description: str | None) -> argparse.ArgumentParser:
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_grid(parser.add_argument_group('what is trained'))
    _add_recipe(parser.add_argument_group("how it is trained, if not by the data set's default recipe"))
    _add_machine(parser.add_argument_group('where it is trained'))
    _add_output(parser.add_argument_group('what is written'))
    return parser


def _add_grid(group: Any) -> None:
    group.add_argument(
        '--datasets',
        nargs='+',
        type=_dataset,
        default=['digits'],
        metavar='NAME',
        help=f'{", ".join(DATASETS)}, or an image folder that contains train and val (default: digits)',
    )
    group.add_argument(
        '--acts',
        nargs='+',
        type=_activation_name,
        default=list(TABLE_ACTIVATIONS),
        metavar='NAME',
        help=f'{", ".join(TABLE_ACTIVATIONS)} (default: all of these), {", ".join(FIGURE_ACTIVATIONS)}, or any '
        'activation of timm',
    )
    group.add_argument(
        '--blocks',
        nargs='+',
        type=int,
        choices=BLOCKS,
        default=[1],
        metavar='B',
        help=f'blocks per stage, 1 to {max(BLOCKS)} (default: 1)',
    )
    group.add_argument(
        '--act-stages',
        nargs='+',
        type=int,
        choices=ACT_STAGES,
        default=[max(ACT_STAGES)],
        metavar='N',
        help='how many of stage 1, stage 2, stage 3 and the last activation have it, counted from the last; the others '
        'have ReLU (default: 4)',
    )
    group.add_argument(
        '--seeds', type=_seeds, default=2, metavar='N', help='number of runs of each network (default: 2)'
    )
    group.add_argument(
        '--shard',
        type=_shard,
        default=(1, 1),
        metavar='I/N',
        help="every Nth run from the Ith on, for a job array, such as '1/4'",
    )


def _add_recipe(group: Any) -> None:
    group.add_argument(
        '--recipe',
        choices=RECIPES,
        help="the settings to start from (default: 'digits' for the digits, else 'authors')",
    )
    group.add_argument('--epochs', type=_positive_int, metavar='N', help='number of epochs')
    group.add_argument(
        '--batch-size', type=_positive_int, metavar='N', help='images per update, summed over all processes'
    )
    group.add_argument('--lr', type=_number(above_zero=True), help='highest learning rate of the schedule')
    group.add_argument('--weight-decay', type=_number(), metavar='WD', help='of all parameters')
    group.add_argument(
        '--size', type=_size, metavar='PX', help='width and height that images are scaled to; CIFAR always has 32'
    )
    group.add_argument('--no-aug', action='store_true', help='no padding, random crop and flip')
    group.add_argument(
        '--hold-out',
        type=_positive_int,
        default=0,
        metavar='N',
        help='measure on N of the training images, which are not trained on; the test set is not used',
    )


def _add_machine(group: Any) -> None:
    group.add_argument(
        '--data-dir', type=Path, default=Path('data'), metavar='DIR', help='folder of the CIFAR files (default: data)'
    )
    group.add_argument('--download', action='store_true', help='let torchvision download CIFAR to the data folder')
    group.add_argument(
        '--device',
        type=_device,
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='device to train on (default: cuda if available, else cpu)',
    )
    group.add_argument('--amp', action='store_true', help='train in mixed precision')
    group.add_argument(
        '--amp-dtype', choices=('float16', 'bfloat16'), default='float16', help='dtype of --amp (default: float16)'
    )
    group.add_argument(
        '--channels-last',
        action=argparse.BooleanOptionalAction,
        help='memory layout (default: channels_last on a CPU, contiguous on a GPU)',
    )
    group.add_argument(
        '--compile',
        action=argparse.BooleanOptionalAction,
        help=f'use torch.compile (default: on a CPU with a C++ compiler, for runs of {COMPILE_FROM} updates or more)',
    )
    group.add_argument(
        '--cuda-graph',
        action=argparse.BooleanOptionalAction,
        help='compute gradients as one CUDA graph (default: on a GPU, in one process, without float16 or --compile)',
    )


def _add_output(group: Any) -> None:
    group.add_argument(
        '--output',
        type=Path,
        default=Path('results/ablation'),
        metavar='DIR',
        help='folder for rows, tables, plots and checkpoints, which several processes may share; finished runs '
        'are skipped, others resumed (default: results/ablation)',
    )
    group.add_argument(
        '--export',
        action='store_true',
        help='also write each trained network as a folder with a model card, for `timm-atac push`',
    )
    group.add_argument('--log-tensorboard', action='store_true', help='write curves to DIR/tensorboard')
    group.add_argument('--log-wandb', action='store_true', help='send curves to Weights & Biases')
    group.add_argument('--wandb-project', metavar='NAME', help='project at Weights & Biases (default: timm_atac)')


def _check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with an error message if a package is missing or the arguments do not fit together."""
    needed_packages = {  # name of the module -> name for pip, and whether it is needed
        'matplotlib': ('matplotlib', True),
        'sklearn': ('scikit-learn', 'digits' in args.datasets),
        'tensorboard': ('tensorboard', args.log_tensorboard),
        'wandb': ('wandb', args.log_wandb),
    }
    for module, package in ((module, package) for module, (package, needed) in needed_packages.items() if needed):
        try:
            importlib.import_module(module)
        except ImportError as error:
            parser.error(f'{error}; install it by `pip install {package}`')
    if args.size not in (None, 32) and any(name.startswith('cifar') for name in {*args.datasets} & {*DATASETS}):
        parser.error(f"argument --size: {args.size}, but CIFAR's images have a size of 32")
    if args.cuda_graph:
        is_float16 = args.amp and args.amp_dtype == 'float16'
        processes = int(os.environ.get('WORLD_SIZE', 1))
        if not args.device.startswith('cuda') or is_float16 or args.compile or processes > 1:
            parser.error(
                'argument --cuda-graph: expected a CUDA device, one process, and neither float16 nor --compile'
            )
    if args.output.is_file():
        parser.error(f'argument --output: {args.output} is a file; expected a folder')


def selected_runs(args: argparse.Namespace, processes: int) -> list[Run]:
    """Return the runs of this shard that the arguments select, each once, always in the same order."""
    found = [
        _run(dataset, name, blocks, act_stages, seed, args, processes)
        for dataset in args.datasets
        for blocks in sorted({*args.blocks})
        for seed in range(args.seeds)
        for name in args.acts
        for act_stages in (args.act_stages if activation(name).takes_act_stages else [max(ACT_STAGES)])
    ]
    index, count = args.shard
    return list(dict.fromkeys(found))[index - 1 :: count]


def _run(
    dataset: str, name: str, blocks: int, act_stages: int, seed: int, args: argparse.Namespace, processes: int
) -> Run:
    settings = RECIPES[args.recipe or default_recipe(dataset)]._asdict()
    given = {key: getattr(args, key) for key in ('epochs', 'batch_size', 'lr', 'weight_decay', 'size')}
    settings.update({key: value for key, value in given.items() if value is not None})
    settings['augment'] = settings['augment'] and not args.no_aug
    precision = args.amp_dtype if args.amp else 'float32'
    parts = dict(precision=precision, processes=processes, held_out=args.hold_out)
    return Run(dataset, name, blocks, act_stages, seed, **settings, **parts)


def _dataset(text: str) -> str:
    if text not in DATASETS and not Path(text).is_dir():
        hint = did_you_mean(text, DATASETS)
        raise argparse.ArgumentTypeError(
            f'{text!r} is neither one of {", ".join(DATASETS)} nor a folder{f"; {hint}" if hint else ""}'
        )
    return text if text in DATASETS else str(Path(text).resolve())


def _activation_name(text: str) -> str:
    name = canonical_name(text)
    if name not in ACTIVATIONS:
        try:
            found = get_act_layer(name)
        except KeyError:
            found = None
        if found is None:
            hint = did_you_mean(text, ACTIVATIONS)
            raise argparse.ArgumentTypeError(
                f'{text!r} is neither one of {", ".join(ACTIVATIONS)} nor an activation of timm'
                f'{f"; {hint}" if hint else ""}'
            )
    return name


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def _seeds(text: str) -> int:
    if _positive_int(text) > 4096:  # the random seed of an epoch has 32 bits, of which 20 are the number of the epoch
        raise argparse.ArgumentTypeError(f'{text!r} is more than 4096')
    return int(text)


def _size(text: str) -> int:
    if _positive_int(text) < 8:
        raise argparse.ArgumentTypeError(f'{text!r} is less than 8, the size of the digits')
    return int(text)


def _number(above_zero: bool = False) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float('inf'):
            raise argparse.ArgumentTypeError(f'{text!r} is not a number of at least 0')
        if above_zero and value == 0:
            raise argparse.ArgumentTypeError(f'{text!r} is not above 0')
        return value

    return number


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition('/')
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard such as '1/4', which is the first of four")
    return int(index), int(count)


def _device(text: str) -> str:
    try:
        device = torch.device(text)
        if device.type == 'meta':
            raise RuntimeError('the meta device computes nothing')
        if device.type == 'cuda':  # do not initialize it: each process of torchrun uses another one
            if (device.index or 0) >= torch.cuda.device_count():
                raise RuntimeError(f'the number of CUDA devices is {torch.cuda.device_count()}')
        else:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f'{text!r} cannot be used: {str(error).splitlines()[0]}') from None
    return text


def parse_args(description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = create_parser(description)
    args = parser.parse_args(argv)
    _check_args(parser, args)
    return args
