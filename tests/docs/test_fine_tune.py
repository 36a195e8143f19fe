"""What docs/fine_tune.md says of FSDP2 and Opacus, whose blocks need more than the page."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from packaging.version import Version
from pages import ROOT, fences

BLOCKS = [fence for fence in fences(ROOT / 'docs' / 'fine_tune.md') if fence.language == 'python']


def block(word: str) -> str:
    (code,) = (fence.code for fence in BLOCKS if word in fence.code)
    return code


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(namespace: dict[str, Any]) -> torch.Tensor:
    y = namespace['model'](torch.randn(2, 3, 64, 64))
    y.float().square().mean().backward()
    namespace['optimizer'].step()
    return y


@pytest.mark.slow
@pytest.mark.skipif(Version(torch.__version__) < Version('2.6'), reason='PyTorch 2.5 has fully_shard elsewhere')
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('network', ['atac_resnet18', 'atac_resnet8_cifar', 'resnet18', 'efficientnet_b0'])
def test_fsdp2(network, one_process) -> None:
    options = ", act_layer='atac'" if not network.startswith('atac') else ''
    code = block('fully_shard').replace("'atac_resnet50'", f"'{network}'{options}")
    namespace: dict[str, Any] = {'timm': timm, 'device_type': 'cpu'}
    exec(code, namespace)
    assert train(namespace).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad is not None for p in namespace['model'].parameters())


@pytest.mark.slow
@pytest.mark.skipif(Version(torch.__version__) < Version('2.6'), reason='PyTorch 2.5 has fully_shard elsewhere')
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        (', output_dtype=torch.bfloat16', '', 'should be the same'),
        ('fully_shard(module, mesh=mesh, mp_policy=norms)', 'pass', 'expected scalar type BFloat16 but found Float'),
    ],
)
def test_policies_of_fsdp2_that_fail(old, new, message, one_process) -> None:
    """Without them, the page could be shorter."""
    code = block('fully_shard').replace('atac_resnet50', 'atac_resnet18')
    assert old in code
    namespace: dict[str, Any] = {'timm': timm, 'device_type': 'cpu'}
    exec(code.replace(old, new), namespace)
    with pytest.raises(RuntimeError, match=message):
        train(namespace)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_opacus() -> None:
    pytest.importorskip('opacus', reason='needs pip install opacus')
    namespace: dict[str, Any] = {'timm': timm, 'torch': torch}
    exec(block('opacus.'), namespace)
    assert namespace['model'].conv1.weight.grad_sample.shape == (3, 16, 3, 3, 3)


def test_to_empty_leaves_norms(tmp_path: Path) -> None:
    """init_weights sets convolutions and linear layers only."""
    model: Any = timm.create_model('resnet18', act_layer='atac', device='meta').to_empty(device='cpu')
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(7)
    model.init_weights()
    assert not (model.conv1.weight == 7).any()
    assert (model.bn1.weight == 7).all() and (model.bn1.running_mean == 7).all()
