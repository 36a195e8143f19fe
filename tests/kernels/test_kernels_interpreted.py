"""The tests of the kernels without a GPU, by Triton's interpreter. It must be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from timm_atac.kernels.switch import IS_INSTALLED


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='they run on the GPU instead')
@pytest.mark.skipif(not IS_INSTALLED, reason='needs PyTorch 2.7 or newer with Triton')
def test_kernels_interpreted(tmp_path) -> None:
    folder = Path(__file__).parent
    tests = ('test_kernels.py', 'test_kernels_training.py', '../benchmarks/test_kernels_benchmarks.py')
    report = tmp_path / 'report.xml'
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--junitxml={report}']
    done = subprocess.run(
        [*command, *(str(folder / test) for test in tests)],
        env=os.environ | {'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = list(ElementTree.parse(report).iter('testcase'))
    skipped = [case.get('name') for case in cases if case.find('skipped') is not None]
    assert len(cases) > 80 and skipped == ['test_atac_of_more_than_32_bits']
