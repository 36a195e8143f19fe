"""tests/helpers/forked.py: code in a forked process ends, prints and warns as in a new interpreter."""

import os
import signal
import subprocess
import sys

import forked
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith('linux'), reason='forks on Linux only')]
CODES = {
    'arguments': 'import sys; print(sys.argv[1:], __name__)',
    'status': 'import sys; print("said"); sys.exit(3)',
    'message': 'raise SystemExit("wrong")',
    'exception': 'raise KeyError(7)',
    'syntax': 'print(1',
    'signal': 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)',
    'warning': 'import warnings; warnings.warn("careful", RuntimeWarning)',
    'exit functions': 'import atexit; atexit.register(print, "at last")',
}


@pytest.mark.parametrize('flags', [(), ('-W', 'error')])
@pytest.mark.parametrize('code', CODES)
def test_as_in_a_new_interpreter(code, flags) -> None:
    found, expected = (run(CODES[code], 'a', 'b c', flags=flags) for run in (forked.run, forked.run_new))
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_timm_and_ours_are_not_imported() -> None:
    code = 'import sys; print([m for m in ("torch", "torchvision", "timm", "timm_atac") if m in sys.modules])'
    assert (
        forked.run(code, env=os.environ | {'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}).stdout == "['torch', 'torchvision']\n"
    )
    assert forked.run(code).stdout == "['torch', 'torchvision', 'timm_atac']\n"


def test_environment_and_folder(tmp_path) -> None:
    code = 'import os; print(os.environ["HERE"], os.getcwd(), os.environ.get("HOME"))'
    assert forked.run(code, env={'HERE': 'yes', **python_variables()}, cwd=tmp_path).stdout == f'yes {tmp_path} None\n'


def python_variables() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key.startswith('PYTHON')}


def test_what_needs_a_new_interpreter() -> None:
    with pytest.raises(ValueError, match=r'these need forked\.run_new'):
        forked.run('', env=os.environ | {'PYTHONHASHSEED': '7'})
    with pytest.raises(ValueError, match=r'these need forked\.run_new'):
        forked.run('', flags=('-I', ''))


def test_too_long(monkeypatch) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run('import signal, time; print("slow", flush=True); signal.alarm(1); time.sleep(60)')


def test_an_interrupted_call_takes_no_answer_of_another() -> None:
    def interrupt(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(1)
    try:
        with pytest.raises(InterruptedError):
            forked.run('import time; time.sleep(5); raise SystemExit(9)')
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert forked.run('print("next")').stdout == 'next\n'
