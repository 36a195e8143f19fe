#!/usr/bin/env python
"""Searches for a `.params` file on which the parser crashes, hangs, takes too much memory or raises a wrong error.

    pip install atheris && python tools/fuzz_params.py --runs 1000000     # guided by coverage (libFuzzer)
    python tools/fuzz_params.py --mutate --runs 1000000                   # random changes to valid files

The only right error is `ParamsError`. Any other result ends the run with a traceback; libFuzzer also saves the file.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests' / 'helpers'))

from params_files import mutate, samples

from timm_atac.weights.params import ParamsError, parse_params


def check(data: bytes) -> bool:
    """True if the file is valid. Its arrays must be readable and together not larger than the file."""
    try:
        arrays = parse_params(data)
    except ParamsError as error:
        assert 0 <= error.offset <= len(data), error
        return False
    assert sum(array.nbytes for array in arrays.values()) <= len(data)
    for array in arrays.values():
        array.tobytes()
    return True


def mutations(runs: int, seed: int) -> str:
    rng = random.Random(seed)
    files = samples()
    valid = 0
    for run in range(runs):
        # every fourth file is changed twice
        data = mutate(rng.choice(files), rng)
        valid += check(mutate(data, rng) if run % 4 == 0 else data)
    return f'{runs} mutations, seed {seed}: {valid} valid files, {runs - valid} times ParamsError, nothing else'


def guided(runs: int, seed: int) -> None:
    """Run libFuzzer, which ends the process after the last run."""
    import atheris

    from timm_atac.weights import params

    atheris.instrument_func(params.parse_params)
    for function in vars(params._Parser).values():
        if callable(function):
            atheris.instrument_func(function)
    with tempfile.TemporaryDirectory() as corpus:
        for i, data in enumerate(samples()):
            Path(corpus, f'{i}').write_bytes(data)
        options = [f'-runs={runs}', f'-seed={seed}', '-max_len=4096', '-timeout=5', '-rss_limit_mb=2048']
        atheris.Setup([sys.argv[0], *options, corpus], check)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=200_000, metavar='N', help='default: 200,000')
    parser.add_argument('--seed', type=int, default=1, metavar='N', help='default: 1')
    parser.add_argument('--mutate', action='store_true', help='random changes instead of atheris')
    args = parser.parse_args()
    start = time.perf_counter()
    if args.mutate:
        print(f'{mutations(args.runs, args.seed)}, {time.perf_counter() - start:.0f} s')
    else:
        guided(args.runs, args.seed)


if __name__ == '__main__':
    main()
