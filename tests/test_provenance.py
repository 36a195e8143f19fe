"""train_scripts/provenance.py"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

provenance = pytest.importorskip('provenance', reason="needs the packages of the extra 'ablation'")


def test_setups_of_a_resumed_run() -> None:
    first = provenance.Setup('cpu', 'contiguous', 'eager', 'abc')
    second = provenance.Setup('cpu', 'channels_last', 'eager', 'def')
    both = provenance.joined([first, second])
    assert both[:4] == ('cpu', 'contiguous + channels_last', 'eager', 'abc + def')
    assert provenance.joined([both, second]) == both
    assert provenance.joined([first, first]) == first


@pytest.mark.parametrize('state', ['clean', 'dirty', 'untracked', 'no repository'])
def test_commit(state, tmp_path, monkeypatch) -> None:
    """Of the repository that has the file: not of one around it that does not know it."""

    def git(*command: str) -> str:
        identity = ('-c', 'user.name=a', '-c', 'user.email=a@b')
        done = subprocess.run(['git', *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    script: Any = Path(shutil.copy(provenance.__file__, tmp_path / 'provenance.py'))
    other = tmp_path / 'other.txt'
    other.write_text('')
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    if state != 'no repository':
        git('init')
        git('add', 'other.txt', *[script.name] * (state != 'untracked'))
        git('commit', '-m', 'first')
    if state == 'dirty':
        other.write_text('changed')
    monkeypatch.setattr(provenance, '__file__', str(script))
    found = provenance.commit.__wrapped__()
    if state in ('clean', 'dirty'):
        assert found == git('rev-parse', 'HEAD')[:12] + '-dirty' * (state == 'dirty')
    else:
        assert found == ''
