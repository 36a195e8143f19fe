"""Runs of the ablation and rows of results for tests. They need the packages of the extra 'ablation'."""

from typing import Any

from ablations.grid import RECIPES, Run
from ablations.provenance import Setup
from ablations.store import Result, Row

RUN = Run(
    'digits',
    'atac',
    blocks=1,
    act_stages=4,
    seed=3,
    epochs=3,
    batch_size=8,
    lr=0.1,
    weight_decay=1e-4,
    size=8,
    augment=True,
    sched='multistep',
)
AUTHORS = Run('cifar100', 'relu', blocks=1, act_stages=4, seed=0, **RECIPES['authors']._asdict())


def make_row(seed: int = 0, accuracy: float = 90.0, seconds: float = 2.0, params: int = 1000, **changes: Any) -> Row:
    """Return a row of `RUN` with another seed and with `changes` in its settings."""
    result = Result(params, 0.5, 0.6, accuracy, accuracy, seconds, seconds, '2026-01-01T00:00:00+00:00')
    return Row(RUN._replace(seed=seed, **changes), result, Setup('cpu'))
