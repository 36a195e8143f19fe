"""The report of benchmarks/gpu.py: tables of all rows, and the outcomes of the predictions in benchmarks/log.md."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
SUMMARY_LINES = 60

# share of a copy's speed in bfloat16 by channels: prediction in benchmarks/log.md, and target
KERNEL_SHARES = {64: (1.00, 0.80), 128: (0.92, 0.80), 256: (0.92, 0.70), 512: (0.52, 0.55)}
# highest predicted time: inference over the equally fused resnet50, training over resnet50
INFERENCE = (('atac_resnet50, fused, kernels', 1.05), ('atac_resnet50_full, fused, kernels', 1.12))
TRAINING = (('atac_resnet50', 1.10), ('atac_resnet50_full', 1.25))


class Claim(NamedTuple):
    """A prediction and its outcome."""

    claim: str
    predicted: str
    outcome: str


def select(rows: Iterable[Row], stage: str, table: str, **values: Any) -> list[Row]:
    wanted = {'stage': stage, 'table': table, **values}
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def predictions(rows: Sequence[Row]) -> list[Claim]:
    """Return every prediction with its outcome, which is 'not measured' if its rows are missing."""
    claims = []
    for channels, (share, target) in KERNEL_SHARES.items():
        found = [
            row['share_of_copy']
            for row in select(rows, 'units', 'inference', form='kernel', dtype='bfloat16')
            if row['shape'].startswith(f'{channels}x')
        ]
        claims.append(
            Claim(
                f'unit of {channels} channels by the kernel, share of a copy',
                f'{share:.0%} (target {target:.0%})',
                _percent(found),
            )
        )
    for model, limit in INFERENCE:
        found = [row['over_fused'] for row in select(rows, 'networks', 'inference', mode='half', model=model)]
        claims.append(
            Claim(f'inference of {model} over resnet50, fused', f'at most {limit:.2f}', _verdict(found, limit))
        )
    training = {
        model: [row['over_resnet50'] for row in select(rows, 'networks', 'training', mode='bf16', model=model)]
        for model in ('atac_resnet50', 'atac_resnet50_full', 'seresnet50')
    }
    for model, limit in TRAINING:
        claims.append(
            Claim(f'training of {model} over resnet50', f'at most {limit:.2f}', _verdict(training[model], limit))
        )
    se, atac = training['seresnet50'], training['atac_resnet50']
    claims.append(
        Claim(
            'training of atac_resnet50 over resnet50',
            f'less than seresnet50 ({_number(se)})',
            _verdict(atac, se[-1]) if se else 'not measured',
        )
    )
    return claims


def _percent(found: list[float]) -> str:
    return f'{found[-1]:.0%}' if found else 'not measured'


def _number(found: list[float]) -> str:
    return f'{found[-1]:.3f}' if found else 'not measured'


def _verdict(found: list[float], limit: float) -> str:
    if not found:
        return 'not measured'
    return f'{found[-1]:.3f}: {"holds" if found[-1] <= limit else "does not hold"}'


def kernel_is_fastest(rows: Sequence[Row]) -> dict[int, bool]:
    """Return True for each number of channels at which the kernel was the fastest form for every shape and dtype."""
    times_by_case: dict[tuple[str, str], dict[str, float]] = {}
    for row in select(rows, 'units', 'inference'):
        # time over a copy in the same rounds, since the compiled form is measured in other rounds
        times_by_case.setdefault((row['shape'], row['dtype']), {})[row['form']] = 1 / row['share_of_copy']
    found: dict[int, bool] = {}
    for (shape, _), times in times_by_case.items():
        others = [time for form, time in times.items() if form not in ('copy', 'ReLU', 'kernel')]
        if 'kernel' in times and 'compiled' in times:
            channels = int(shape.split('x')[0])
            found[channels] = found.get(channels, True) and times['kernel'] < min(others)
    return found


def report(rows: Sequence[Row], ended: Sequence[Any], args: argparse.Namespace) -> str:
    """Return the report in Markdown."""
    parts = ['# Measurements on a GPU', _note(args), _steps(ended)]
    if not args.small:
        parts += ['## Predictions', _table([claim._asdict() for claim in predictions(rows)]), _fastest_note(rows)]
    names = dict.fromkeys((row['stage'], row['table']) for row in rows)
    for stage, table in names:
        found = [{k: v for k, v in row.items() if k not in ('stage', 'table')} for row in select(rows, stage, table)]
        parts.append(f'## {stage}: {table}\n\n{_table(found)}')
    return '\n\n'.join(filter(None, parts)) + '\n'


def summary(rows: Sequence[Row], ended: Sequence[Any], args: argparse.Namespace) -> str:
    """Return the most important lines of the report, at most `SUMMARY_LINES`."""
    lines = [f'\n{_note(args)}', '']
    for row in select(rows, 'machine', 'machine') + select(rows, 'machine', 'ceilings'):
        if row['what'] in ('card', 'driver', 'torch', 'triton') or row['table'] == 'ceilings':
            lines.append(f'{row["what"]}: {row["value"]} {row.get("unit", "")}'.rstrip())
    lines += [f'{step.stage} {step.step}: {step.how}, {step.seconds:.0f} s' for step in ended]
    for row in select(rows, 'correct', 'tests'):
        lines.append(
            f'{row["file"]}: {row["passed"]} passed, {row["failed"]} failed, {row["skipped"]} skipped, '
            f'{row["warnings"]} warnings'
        )
    if not args.small:
        lines += [f'{c.claim}: predicted {c.predicted}, outcome {c.outcome}' for c in predictions(rows)]
        lines.append(_fastest_note(rows))
    for row in rows:
        if row['table'] in ('failures', 'errors', 'skipped'):
            what = row.get('test') or row.get('what')
            lines.append(f'{row["table"]}: {what}: {row.get("why") or row.get("error") or row.get("reason")}'[:160])
    last = f'Report: {args.out / "report.md"}'
    if len(lines) > SUMMARY_LINES - 2:
        lines = [*lines[: SUMMARY_LINES - 3], f'... {len(lines) - SUMMARY_LINES + 3} more lines in the report']
    return '\n'.join([*lines, last])


def _note(args: argparse.Namespace) -> str:
    how = 'Tiny sizes: this run only shows that every stage runs. Its times mean nothing.' if args.small else ''
    return f'Device: {args.device}. Stages: {", ".join(args.stages)}, {args.minutes:g} minutes. {how}'.strip()


def _steps(ended: Sequence[Any]) -> str:
    rows = [{'stage': s.stage, 'step': s.step, 'ended': s.how, 'seconds': round(s.seconds, 1)} for s in ended]
    return f'## Stages\n\n{_table(rows)}' if rows else ''


def _fastest_note(rows: Sequence[Row]) -> str:
    found = kernel_is_fastest(rows)
    if not found:
        return 'Kernel of a unit in inference: not measured together with the compiled form.'
    texts = [f'{channels}: {"yes" if won else "no"}' for channels, won in sorted(found.items())]
    return f'Kernel is the fastest form in inference for every shape and dtype, by channels: {", ".join(texts)}.'


def _table(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ['---'] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _cell(value: Any) -> str:
    text = '' if value is None else f'{value:.4g}' if isinstance(value, float) else str(value)
    return text.replace('|', '\\|').replace('\n', ' ')
