"""train_scripts/ablations/provenance.py"""

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

provenance = pytest.importorskip('ablations.provenance', reason="needs the packages of the extra 'ablation'")


def test_setups_of_a_resumed_run() -> None:
    first = provenance.Setup('cpu', 'contiguous', 'eager', 'abc')
    second = provenance.Setup('cpu', 'channels_last', 'eager', 'def')
    both = provenance.join_setups([first, second])
    assert both[:4] == ('cpu', 'contiguous + channels_last', 'eager', 'abc + def')
    assert provenance.join_setups([both, second]) == both
    assert provenance.join_setups([first, first]) == first


@pytest.mark.parametrize('state', ['clean', 'dirty', 'untracked', 'no repository', 'installed elsewhere'])
def test_commit(state, tmp_path, monkeypatch) -> None:
    """The commit is only known if git tracks the file and the package is imported from the same checkout."""

    def git(*command: str) -> str:
        identity = ('-c', 'user.name=a', '-c', 'user.email=a@b')
        done = subprocess.run(['git', *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    folder = tmp_path / 'train_scripts' / 'ablations'
    folder.mkdir(parents=True)
    script: Any = Path(shutil.copy(provenance.__file__, folder / 'provenance.py'))
    package = tmp_path / ('timm_atac' if state != 'installed elsewhere' else 'elsewhere/timm_atac') / '__init__.py'
    other = tmp_path / 'other.txt'
    other.write_text('')
    monkeypatch.delenv('SOURCE_COMMIT', raising=False)
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    if state != 'no repository':
        git('init')
        git('add', 'other.txt', *[str(script)] * (state != 'untracked'))
        git('commit', '-m', 'first')
    if state == 'dirty':
        other.write_text('changed')
    monkeypatch.setattr(provenance, '__file__', str(script))
    monkeypatch.setattr(provenance.timm_atac, '__file__', str(package))
    found = provenance.commit.__wrapped__()
    if state in ('clean', 'dirty'):
        assert found == git('rev-parse', 'HEAD')[:12] + '-dirty' * (state == 'dirty')
    else:
        assert found == ''
    monkeypatch.setenv('SOURCE_COMMIT', '0123456789abcdef')
    assert provenance.commit.__wrapped__() == '0123456789ab'


def test_data_hash() -> None:
    images, labels = torch.arange(12, dtype=torch.uint8).view(3, 4), torch.arange(3)
    found = provenance.data_hash([images, labels])
    assert found == hashlib.sha256(bytes(range(12)) + labels.numpy().tobytes()).hexdigest()[:12]
    assert found != provenance.data_hash([images.t().contiguous(), labels])


def test_device_name_has_the_cpu() -> None:
    assert provenance.device_name(torch.device('cpu')).endswith(f', {torch.get_num_threads()} threads')
    assert torch.backends.cpu.get_cpu_capability() in provenance.device_name(torch.device('cpu'))
