#!/usr/bin/env python
"""Print the paper's tables from the CSV files of `ablation.py`, with the figures that the authors report.

The tables are in Markdown. --output also writes them and the plots to a folder.

    python train_scripts/tables.py results/ablation/ablation.csv --output results/ablation-tables
    python train_scripts/tables.py --imagenet
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from ablations.store import StoreError, read_rows
from ablations.table4 import imagenet_table
from ablations.tables import all_tables, first_rows, write_tables

from timm_atac.cli.parser import Parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('csv', nargs='*', type=Path, metavar='CSV', help='CSV files that ablation.py wrote')
    parser.add_argument('--output', type=Path, metavar='DIR', help='write tables.md and the plots to this folder')
    parser.add_argument('--imagenet', action='store_true', help='also print Table 4, of the registered networks')
    timed = parser.add_argument_group('latency in Table 4')
    timed.add_argument(
        '--rounds',
        type=int,
        default=5,
        help='timed forward passes of each network; 0 leaves the latency out (default: 5)',
    )
    timed.add_argument('--device', default='cpu', help='default: cpu')
    timed.add_argument('--batch-size', type=int, default=1, help='default: 1')
    args = parser.parse_args(argv)
    if args.rounds < 0:
        parser.error(f'--rounds {args.rounds}: expected 0 or more')
    if not args.csv and not args.imagenet:
        parser.error('nothing to do: give CSV files, or --imagenet')
    for path in args.csv:
        if not path.is_file():
            problem = 'it is a folder' if path.is_dir() else 'the file does not exist'
            parser.error(f'argument CSV: {path}: {problem}; expected a CSV file that ablation.py wrote')
    if args.imagenet:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            parser.error(f'argument --device: {args.device!r} cannot be used: {str(error).splitlines()[0]}')
    try:
        rows = first_rows([row for path in args.csv for row in read_rows(path)])
        if args.csv and not rows:
            parser.error(f'there are no rows in {", ".join(map(str, args.csv))}')
        imagenet = imagenet_table(args.device, args.batch_size, args.rounds) if args.imagenet else ''
        text = '\n\n'.join(filter(None, [all_tables(rows), imagenet]))
        print(text)
        if args.output:
            print('\nWrote:', *write_tables(rows, text, args.output), sep='\n')
    except ImportError as error:
        parser.error(f'{error}; install it by `pip install {error.name or "matplotlib"}`')
    except StoreError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f'{error.filename}: {error.strerror}' if error.filename else str(error))
    return 0


if __name__ == '__main__':
    sys.exit(main())
