#!/usr/bin/env python
"""The paper's tables and figures from the rows that `ablation.py` has written, next to what the authors report.

Prints Markdown, and writes it with the plots where that is asked for:

    python train_scripts/tables.py results/ablation/ablation.csv --output results/ablation-tables
    python train_scripts/tables.py --imagenet
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ablations.store import StoreError, read_rows
from ablations.tables import imagenet_table, merge, tables, write


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('csv', nargs='*', type=Path, metavar='CSV', help='files that ablation.py has written')
    parser.add_argument(
        '--output', type=Path, metavar='DIR', help='also write tables.md and the plots, into this folder'
    )
    parser.add_argument('--imagenet', action='store_true', help='Table 4 as well, from the registry')
    timed = parser.add_argument_group('latency in Table 4')
    timed.add_argument('--rounds', type=int, default=5, help='forward passes of each network; 0: none (default: 5)')
    timed.add_argument('--device', default='cpu', help='default: cpu')
    timed.add_argument('--batch-size', type=int, default=1, help='default: 1')
    args = parser.parse_args(argv)
    if args.rounds < 0:
        parser.error(f'--rounds {args.rounds}: expected 0 or more')
    if not args.csv and not args.imagenet:
        parser.error('nothing to do: give CSV files, or --imagenet')
    try:
        rows = merge([row for path in args.csv for row in read_rows(path)])
        if args.csv and not rows:
            parser.error(f'no rows in {", ".join(map(str, args.csv))}')
        imagenet = imagenet_table(args.device, args.batch_size, args.rounds) if args.imagenet else ''
        text = '\n\n'.join(filter(None, [tables(rows), imagenet]))
        print(text)
        if args.output:
            print('\nWrote:', *write(rows, text, args.output), sep='\n')
    except ImportError as error:
        parser.error(f"{error}; it comes with `pip install 'timm_atac[viz]'`")
    except (OSError, RuntimeError, StoreError) as error:  # RuntimeError: a device there is not
        parser.error(str(error))
    return 0


if __name__ == '__main__':
    sys.exit(main())
