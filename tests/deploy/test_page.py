"""Each code block of docs/deploy.md runs, and what it computes is what the model computes."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from deploy import FORMS
from deployed_networks import difference, network
from pages import Block, python_blocks

import timm_atac

PAGE = Path(__file__).parents[2] / 'docs' / 'deploy.md'
FIRST, *BLOCKS = python_blocks(PAGE)
OPTIONAL = {
    'coremltools',
    'executorch',
    'nncf',
    'onnx',
    'onnxruntime',
    'onnxscript',
    'openvino',
    'torch_pruning',
    'torchao',
}
NO_OUTPUT = ('ONNX', 'Core ML')  # these blocks write a file that nothing here runs


def label(block: Block) -> str:
    return f'{block.section}-{block.number}'


def limit(block: Block) -> float:
    if 'int8' in block.section or 'nncf' in block.code:
        return 0.5
    return 0.05 if block.section == 'bfloat16' else 1e-5


def blocks_before(block: Block) -> list[Block]:
    """Return the blocks that write the files and import the modules that a block uses."""
    before: list[Block] = []
    for section in ('ONNX', 'ONNX Runtime'):
        if section != block.section and (block.section == 'ONNX Runtime' or 'onnxruntime' in block.code):
            before += [other for other in BLOCKS if other.section == section and other.number == 0]
    return before


def execute(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block. Skips the test if a library of the block is not installed."""
    try:
        exec(compile(block.code, f'{PAGE.name}, {label(block)}', 'exec'), namespace)
    except ModuleNotFoundError as error:
        if (error.name or '').partition('.')[0] not in OPTIONAL:
            raise
        pytest.skip(f'{error.name} is not installed')


def test_first_block() -> None:
    code = FIRST.code.replace('(4, 3, 224, 224)', '(1, 3, 32, 32)')
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert not namespace['model'].training
    assert [batch.shape for batch in namespace['calibration']] == [(1, 3, 32, 32)] * 8


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of the exporters and their libraries
@pytest.mark.parametrize('block', BLOCKS, ids=label)
def test_block(block, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = torch.backends.quantized.engine
    model, images = network('atac_resnet8_cifar')
    calibration = [images, *(torch.randn_like(images) for _ in range(3))]
    namespace = {'model': copy.deepcopy(model), 'images': images, 'calibration': calibration}
    namespace |= {'timm': timm, 'torch': torch, 'timm_atac': timm_atac}
    try:
        for other in blocks_before(block):
            execute(other, namespace)
        namespace.pop('y', None)
        execute(block, namespace)
    finally:
        torch.backends.quantized.engine = engine
    if block.section in NO_OUTPUT:
        assert 'y' not in namespace and list(tmp_path.iterdir())
    elif block.section == 'Pruning':  # another function
        assert namespace['y'].shape == model(images).shape
    else:
        assert difference(namespace['y'], model(images)) < limit(block)


def test_links() -> None:
    """Each file that the page names exists, and has the heading that the link names."""
    for target in re.findall(r'\]\(([^)]+)\)', PAGE.read_text()):
        file, _, anchor = target.partition('#')
        path = PAGE.parent / file if file else PAGE
        if not target.startswith('https:'):
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


def anchors(path: Path) -> set[str]:
    headings = re.findall(r'^#+ (.+)', path.read_text(), re.MULTILINE)
    return {re.sub(r'[^a-z0-9 _-]', '', heading.lower()).replace(' ', '-') for heading in headings}


def test_table_of_times() -> None:
    """Between the two comments, the page has the file that benchmarks/deploy.py wrote, or no table yet."""
    start, end = '<!-- table of results/deploy.md -->\n', '<!-- end of table -->'
    text = PAGE.read_text()
    table = text[text.index(start) + len(start) : text.index(end)]
    file = PAGE.parents[1] / 'results' / 'deploy.md'
    assert table.strip() == (file.read_text().strip() if file.exists() else '')
    assert not table.strip() or all(f'| {form.label} |' in table for form in FORMS.values())
