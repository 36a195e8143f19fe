"""Stage that runs test files on the device. Times are only valid if the tests pass."""

import os
import signal
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpu_stages.stage import Stage, main

TESTS = Path(__file__).parents[2] / 'tests'
SMALL = '(test_kernels and 16 and channels_last) or second_derivatives'


class Record:
    """A pytest plugin that emits each failure at once, and counts the results of each file."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.start = time.monotonic()
        self.counts: dict[str, Counter[str]] = {Path(file).name: Counter() for file in stage.args}
        self.missing: dict[str, str] = {}

    def _counts_of(self, nodeid: str) -> Counter[str]:
        return self.counts.setdefault(Path(nodeid.split('::')[0]).name, Counter())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._counts_of(report.nodeid)['failed'] += 1
            why = str(report.longrepr).strip().splitlines()
            self.stage.emit('failures', test=report.nodeid, when=report.when, why=why[-1][:300] if why else '')
        elif report.skipped:
            self._counts_of(report.nodeid)['skipped'] += 1
        elif report.when == 'call':
            self._counts_of(report.nodeid)['passed'] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.failed:
            return
        name, lines = Path(report.nodeid).name, str(report.longrepr).strip().splitlines()
        missing = [line for line in lines if 'ModuleNotFoundError' in line]
        if name in self.missing:
            return  # another process of xdist has reported it
        self.missing[name] = missing[-1] if missing else lines[-1]
        if missing:
            self.stage.skip(name, missing[-1])
        else:
            self._counts_of(name)['failed'] += 1
            self.stage.emit('failures', test=name, when='collection', why=lines[-1][:300])

    def pytest_warning_recorded(self, nodeid: str) -> None:
        self._counts_of(nodeid or 'elsewhere')['warnings'] += 1

    def emit(self) -> None:
        """Emit the counts. They are also emitted if the run is ended early."""
        for file, count in self.counts.items():
            kinds = {kind: count[kind] for kind in ('passed', 'failed', 'skipped', 'warnings')}
            self.stage.emit('tests', file=file, **kinds, seconds=round(time.monotonic() - self.start, 1))


def run(stage: Stage) -> None:
    record = Record(stage)
    # another release of PyTorch may emit other warnings: they are counted and do not fail a test
    options = ['-q', '-m', 'not slow', '-p', 'no:cacheprovider', '-o', 'filterwarnings=default', '--tb=short']
    # compiles_for_gpus compiles for other GPUs
    options += ['-k', SMALL if stage.small else 'not compiles_for_gpus', '--show-capture=no']
    if find_spec('xdist') is not None and not stage.small:
        options += ['-n', str(min(8, max(1, (os.cpu_count() or 2) // 2)))]
    files = [str(path) for file in stage.args for path in TESTS.rglob(file)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = pytest.main([*options, *files], plugins=[record])
    finally:
        record.emit()
    has_failed = any(count['failed'] for count in record.counts.values())
    if has_failed or (status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not record.missing):
        sys.exit(1)


if __name__ == '__main__':
    main('correct', run)
