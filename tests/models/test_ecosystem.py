"""Libraries on top of timm create our networks and units. Their programs do not import timm_atac."""

from importlib.util import find_spec
from typing import Any

import pytest
import timm
import torch
from torchvision.models.feature_extraction import create_feature_extractor

INSTALL = "needs pip install '.[ecosystem]'"

# The start of every program. Each runs in a new interpreter and names `timm_atac` without an import.
UNITS = """
def units(model):
    return sum(type(m).__name__ == 'ATACMe' and type(m).__module__.startswith('timm_atac.') for m in model.modules())
"""

SMP = """
import segmentation_models_pytorch as smp
import torch

torch.manual_seed(0)
# our network, and timm's with our activation: smp creates encoders that it does not have with `timm.create_model`
for encoder, kwargs, expected in (('tu-atac_resnet50', {}, 18), ('tu-resnet18', dict(act_layer='atac'), 17)):
    model = smp.Unet(encoder, encoder_weights=None, classes=2, **kwargs)
    assert units(model.encoder) == units(model) == expected
    y = model(torch.randn(2, 3, 64, 96))
    assert y.shape == (2, 2, 64, 96)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
print('done')
"""

FASTAI = """
import tempfile
from fastai.vision.all import *

set_seed(0)
images = [PILImage.create(np.random.randint(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(12)]
with tempfile.TemporaryDirectory() as path:
    # two training batches, loaded without fastai's worker processes
    split = dict(valid_pct=1 / 3, bs=4, num_workers=0, device='cpu')
    dls = ImageDataLoaders.from_lists(path, images, ['cat', 'dog'] * 6, **split)
    for arch, kwargs, expected in (('atac_resnet50', {}, 18), ('resnet18', dict(act_layer='atac'), 17)):
        learn = vision_learner(dls, arch, pretrained=False, **kwargs)
        assert units(learn.model) == expected
        before = [p.detach().clone() for p in learn.model.parameters()]
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        train_loss, valid_loss = learn.recorder.values[0]
        assert np.isfinite(train_loss) and np.isfinite(valid_loss)
        assert not any(torch.equal(p, q) for p, q in zip(before, learn.model.parameters()))
print('done')
"""

LIGHTNING = """
import tempfile
import lightning
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

class Classifier(lightning.LightningModule):
    def __init__(self, name, **kwargs):
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(name, num_classes=4, **kwargs)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

torch.manual_seed(0)
data = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 4), batch_size=4)
quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
for name, kwargs, expected in (('atac_resnet8_cifar', {}, 7), ('resnet18', dict(act_layer='atac'), 17)):
    model = Classifier(name, **kwargs)
    assert units(model) == expected
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as path:
        trainer = lightning.Trainer(max_steps=2, accelerator='cpu', default_root_dir=path, **quiet)
        trainer.fit(model, data)
        assert trainer.global_step == 2
        # loading the file creates the model again by its name
        again = Classifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert units(again) == expected
    after = model.state_dict()
    assert all(v.isfinite().all() and not torch.equal(v, before[k]) for k, v in after.items())
    assert again.state_dict().keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in again.state_dict().items())
print('done')
"""


def program(package: str, code: str):
    # not `importorskip`, since importing fastai changes classes of PyTorch for all later tests of the process
    return pytest.param(code, marks=pytest.mark.skipif(find_spec(package) is None, reason=INSTALL), id=package)


@pytest.fixture
def smp() -> Any:
    return pytest.importorskip('segmentation_models_pytorch', reason=INSTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    'code',
    [program('segmentation_models_pytorch', SMP), program('fastai', FASTAI), program('lightning', LIGHTNING)],
)
def test_program(new_python, code) -> None:
    assert new_python(UNITS + code).stdout.endswith('done\n')


@pytest.mark.slow
def test_program_without_us_fails(python, smp) -> None:
    with pytest.raises(AssertionError, match=r'Unknown model \(atac_resnet50\)'):
        python(UNITS + SMP, TIMM_ATAC_DISABLE='1')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['atac_resnet18', 'atac_resnet50'])
@pytest.mark.parametrize('output_stride', [8, 16])
def test_smp_dilated(smp, name, output_stride) -> None:
    model = smp.DeepLabV3Plus(f'tu-{name}', encoder_weights=None, classes=2, encoder_output_stride=output_stride)
    x = torch.randn(2, 3, 64, 96)
    assert model.encoder(x)[-1].shape[2:] == (64 // output_stride, 96 // output_stride)
    y = model(x)
    assert y.shape == (2, 2, 64, 96)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_smp_save_and_load(smp, tmp_path) -> None:
    model = smp.Unet('tu-resnet18', encoder_weights=None, act_layer='atac').eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(smp.from_pretrained(tmp_path).eval()(x), model(x))


# two stages, and a node inside a unit of the second
RESNET18_NODES = {'layer3': (2, 256, 4, 6), 'layer4': (2, 512, 2, 3), 'layer4.1.act1': (2, 512, 2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, kwargs, nodes',
    [
        ('atac_resnet18', {}, RESNET18_NODES),
        ('resnet18', dict(act_layer='atac'), RESNET18_NODES),
        ('atac_resnet8_cifar', {}, {'stages.1': (2, 32, 32, 48), 'stages.2': (2, 64, 16, 24)}),
    ],
)
def test_torchvision_feature_extractor(name, kwargs, nodes) -> None:
    model: Any = timm.create_model(name, **kwargs)
    extractor = create_feature_extractor(model, list(nodes))
    x = torch.randn(2, 3, 64, 96)
    features = extractor(x)
    assert {node: tuple(feature.shape) for node, feature in features.items()} == nodes
    sum(feature.sum() for feature in features.values()).backward()

    expected = {}
    for node in nodes:
        model.get_submodule(node).register_forward_hook(lambda _, __, y, node=node: expected.update({node: y}))
    model.eval()(x)
    for node, feature in extractor.eval()(x).items():
        torch.testing.assert_close(feature, expected[node])  # torch.fx traces into the unit
