"""Run code as in a new interpreter, in less time: `run('import timm; print(timm.__version__)').stdout`.

A new interpreter needs three to four seconds to import PyTorch and torchvision. Here one process imports them once,
without this package, and forks for each call. The forked process then finishes the import of PyTorch as PyTorch does:
it loads the entry points of `torch.backends`. timm and all that is imported afterwards is imported anew. Where forking
does not work, or where the interpreter's start or PyTorch's import is tested, use `run_new`.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIMEOUT = 240  # seconds
_server: Any = None  # subprocess.Popen
_at_its_start: dict[str, str] = {}  # the environment variables that Python reads when it starts


def run(
    code: str, *args: str, flags: Sequence[str] = (), env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in a forked process, like `python FLAGS -c CODE ARGS`.

    Args:
        code: Python code.
        args: Its `sys.argv[1:]`.
        flags: Pairs of `-W` and a filter of warnings. Other flags need `run_new`.
        env: All environment variables. Those that Python reads when it starts, `PYTHON...`, are those of this process
            at the first call; others need `run_new`. Default: those of this process.
        cwd: The working directory. Default: that of this process.

    Raises:
        ValueError: `flags` or `env` need a new interpreter.
        subprocess.TimeoutExpired: The code ran for longer than `TIMEOUT`.
    """
    env = dict(os.environ if env is None else env)
    if not sys.platform.startswith('linux'):
        return run_new(code, *args, flags=flags, env=env, cwd=cwd)
    _start()
    if {*flags[::2]} - {'-W'} or _read_at_start(env) != _at_its_start:
        raise ValueError(f'flags={flags}, env={_read_at_start(env)}: these need forked.run_new')
    command = ['python', *flags, '-c', code, *args]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ('stdout', 'stderr')]
        request = dict(
            code=code, args=args, warnings=flags[1::2], env=env, cwd=str(cwd or os.getcwd()), outputs=outputs
        )
        status = _ask(request)
        stdout, stderr = (Path(path).read_text(encoding='utf-8') for path in outputs)
    if status == -signal.SIGALRM:
        raise subprocess.TimeoutExpired(command, TIMEOUT, stdout, stderr)
    return subprocess.CompletedProcess(command, status, stdout, stderr)


def run_new(
    code: str, *args: str, flags: Sequence[str] = (), env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter. The arguments are those of `run`, with any flags and variables."""
    command = [sys.executable, *flags, '-c', code, *args]
    return subprocess.run(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT
    )


def _read_at_start(env: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in env.items() if key.startswith('PYTHON')}


def _start() -> None:
    """Start the process that forks, unless it runs."""
    global _server, _at_its_start
    if _server is not None and _server.poll() is None:
        return
    _at_its_start = _read_at_start(os.environ)
    env = {k: v for k, v in os.environ.items() if not k.startswith('TIMM_ATAC')}
    _server = subprocess.Popen(
        [sys.executable, __file__],
        env={**env, 'PYTHONIOENCODING': 'utf-8', 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_server.stdin.close)  # it ends when its input does


def _ask(request: dict[str, Any]) -> int:
    """Let the process fork, and return the exit status of the forked one."""
    global _server
    try:
        _server.stdin.write(f'{json.dumps(request)}\n')
        _server.stdin.flush()
        answer = _server.stdout.readline()
    except BaseException:  # the answer to come belongs to this request
        with _server:  # closes its pipes
            _server.kill()
        _server = None
        raise
    if not answer:
        raise RuntimeError(f'The process that forks has ended, with status {_server.wait()}.')
    return int(answer)


def _serve() -> dict[str, Any]:
    """Fork for each request, and answer with the exit status. Return the request in the forked process."""
    import warnings

    # timm imports both. Neither imports timm.
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    warnings.filterwarnings('ignore', '.*use of fork', DeprecationWarning)  # the threads are those of NumPy's BLAS
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)


def _become(request: dict[str, Any]) -> dict[str, Any]:
    """Make the process what a new interpreter would be. Return the namespace of its `__main__`."""
    import types
    import warnings

    import torch

    signal.alarm(TIMEOUT)
    for fd, path in enumerate([os.devnull, *request['outputs']]):
        opened = os.open(path, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, fd)
        os.close(opened)
    os.chdir(request['cwd'])
    os.environ.clear()
    os.environ.update(request['env'])
    sys.argv = ['-c', *request['args']]
    sys.path[0] = ''
    sys.warnoptions[:] = request['warnings']
    warnings._processoptions(sys.warnoptions)  # type: ignore[attr-defined]
    main = types.ModuleType('__main__')
    sys.modules['__main__'] = main
    if os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD', '1') == '1':
        torch._import_device_backends()  # type: ignore[attr-defined]
    return vars(main)


if __name__ == '__main__':
    _request = _serve()
    _namespace = _become(_request)
    exec(compile(_request['code'], '<string>', 'exec'), _namespace)
