"""`where='paper'`: the inner activations of the blocks of the last two stages. docs/any_model.md has the rules."""

from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from timm_atac import replace_activations

X = torch.randn(2, 3, 16, 16)


def names(model: nn.Module, where: Any = 'paper', x: Any = None) -> list[str]:
    return [r.name for r in replace_activations(model, where=where, example_input=x, dry_run=True).replaced]


class PostActivation(nn.Module):
    """As in ResNet: an activation in the branch, and one after the addition. `se` is a gate of the branch."""

    def __init__(self, width: int, stride: int = 1, se: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, stride=stride)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU(inplace=True)
        self.se = SqueezeExcite(width) if se else nn.Identity()
        self.shortcut = nn.Conv2d(width, width, 1, stride=stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.se(self.conv2(self.act1(self.conv1(x))))
        y += self.shortcut(x)
        return self.act2(y)


class PreActivation(nn.Module):
    """As in ResNetV2, with or without norms: the activations are in front of the convolutions."""

    def __init__(self, width: int, stride: int = 1, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)  # type: ignore[call-arg]
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, stride=stride)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.downsample = nn.Conv2d(width, width, 1, stride=stride) if stride > 1 else None

    def forward(self, x):
        y = self.act1(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        return self.conv2(self.act2(self.norm2(self.conv1(y)))) + shortcut


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(width, 2, 1), nn.ReLU(), nn.Conv2d(2, width, 1)

    def forward(self, x):
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Tokens(nn.Module):
    """A transformer block whose attention has activations, and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = LinearAttention(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class LinearAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.kernel, self.act = nn.Linear(width, 3 * width), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.act(self.kernel(q) @ (k.transpose(1, 2) @ v))


def network(block, **kwargs) -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        *(nn.Sequential(block(8, **kwargs), block(8, 2, **kwargs), block(8, **kwargs)) for _ in range(3)),
        nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4)),
    )


STAGES_2_AND_3 = ['1.1', '1.2', '2.0', '2.1', '2.2', '3.0', '3.1', '3.2']  # blocks of the maps of 4 x 4 and 2 x 2 px


@pytest.mark.parametrize('se', [False, True])
def test_the_activation_after_an_addition_stays(se) -> None:
    blocks = ['2.1', '2.2', '3.0', '3.1', '3.2']
    assert names(network(PostActivation, se=se), x=X) == [f'{block}.act1' for block in blocks]


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.Identity])
def test_the_first_activation_of_a_pre_activation_block_is_taken(norm) -> None:
    blocks = ['2.1', '2.2', '3.0', '3.1', '3.2']
    assert names(network(PreActivation, norm=norm), x=X) == [f'{b}.{act}' for b in blocks for act in ('act1', 'act2')]


@pytest.mark.slow
def test_attention_is_taken_only_by_its_word() -> None:
    model = network(PostActivation, se=True)
    gates = [f'{stage}.{block}.se.act' for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert names(model, 'attention', X) == gates
    assert names(model, -1, X) == ['3.1.act1', '3.1.act2', '3.2.act1', '3.2.act2']
    assert '3.1.se.act' in names(model, [-1, 'attention'], X)
    assert '3.1.se.act' in names(model, ['paper', 'attention'], X)
    assert '2.0.se.act' not in names(model, ['paper', 'attention'], X)
    assert '3.1.se.act' not in names(model, nn.ReLU, X)
    assert names(model, '3.1.se.act', X) == ['3.1.se.act']
    assert set(gates) < set(names(model, 'all', X)) == set(names(model, None, X))


def test_tokens() -> None:
    """Every block of a transformer is a stage. Activations before and after the products are those of attention."""
    model = nn.Sequential(*(Tokens(6) for _ in range(4)))
    x = torch.randn(2, 7, 6)
    assert names(model, x=x) == ['2.mlp.2', '3.mlp.2']
    assert names(model, [1, 'attention'], x) == ['0.attn.kernel', '0.attn.act', '0.mlp.2']


@pytest.mark.slow
def test_without_additions_all_are_taken() -> None:
    """As in a VGG, where the activations of the classifier get one value per channel."""
    vgg = torchvision.models.vgg11(weights=None)
    assert names(vgg) == ['features.12', 'features.14', 'features.17', 'features.19']
    assert names(vgg, -1) == ['features.17', 'features.19']


@pytest.mark.slow
def test_inner_names_do_not_matter() -> None:
    def rename(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            rename(child)
            if name.startswith('act'):
                delattr(module, name)
                module.add_module(f'se_{name}', child)

    class Renamed(PostActivation):
        def forward(self, x):
            y = self.conv2(F.relu(self.conv1(x)))
            return F.relu(torch.add(y, self.shortcut(x)))

    model = network(Renamed)
    assert names(model, x=X) == [f'{block}.relu' for block in ('2.1', '2.2', '3.0', '3.1', '3.2')]


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, count, examples',
    [
        ('resnet50', 18, ['layer3.0.act1', 'layer4.2.act2']),
        ('resnet18', 4, ['layer3.0.act1', 'layer4.1.act1']),
        ('resnetv2_50', 27, ['stages.2.blocks.0.norm1.act', 'stages.3.blocks.2.norm3.act']),
        ('resnext50_32x4d', 18, ['layer3.0.act1', 'layer4.2.act2']),
        ('regnety_008', 20, ['s3.b1.conv1.bn.act', 's4.b2.conv2.bn.act']),
        ('efficientnet_b0', 22, ['blocks.3.0.bn1.act', 'blocks.6.0.bn2.act']),
        ('mobilenetv3_large_100', 19, ['blocks.3.0.bn1.act', 'blocks.6.0.bn1.act']),
        ('convnext_atto', 8, ['stages.2.blocks.0.mlp.act', 'stages.3.blocks.1.mlp.act']),
        ('densenet121', 83, ['features.transition2.norm.act', 'features.norm5.act']),
        ('vit_tiny_patch16_224', 2, ['blocks.10.mlp.act', 'blocks.11.mlp.act']),
        ('swin_tiny_patch4_window7_224', 8, ['layers.2.blocks.0.mlp.act', 'layers.3.blocks.1.mlp.act']),
        ('vgg16', 6, ['features.18', 'features.29']),
        ('resnet20_cifar', 12, ['stages.1.0.act1', 'stages.2.2.act2']),
        ('dm_nfnet_f0', 36, ['stages.2.0.act1', 'stages.3.2.act3']),
    ],
)
def test_families(name, count, examples) -> None:
    with torch.device('meta'):
        model = timm.create_model(name)
    found = names(model)
    assert (len(found), [found[0], found[-1]]) == (count, examples)


@pytest.mark.slow
def test_resnet50_is_the_papers_network() -> None:
    ours: Any = timm.create_model('atac_resnet50').eval()
    model: Any = replace_activations(timm.create_model('resnet50'), where='paper').eval()
    assert sum(p.numel() for p in model.parameters()) == 27_934_760
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in ours.named_parameters()]
    model.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), ours(x), rtol=0, atol=0)
    assert model.replaced_activations.model_args == {'host': 'resnet50', 'act': 'atac', 'where': 'paper'}


@pytest.mark.slow
def test_torchvision_resnet50_is_the_papers_network() -> None:
    """Its blocks share one ReLU; `relu` and `relu_1` are timm's `act1` and `act2`."""
    ours: Any = timm.create_model('atac_resnet50').eval()
    model: Any = replace_activations(torchvision.models.resnet50(weights=None), where='paper').eval()
    assert sum(p.numel() for p in model.parameters()) == 27_934_760
    state = {k.replace('.act1.', '.relu.').replace('.act2.', '.relu_1.'): v for k, v in ours.state_dict().items()}
    model.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), ours(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet', 'vit', 'bert'])
def test_transformers(name) -> None:
    transformers = pytest.importorskip('transformers')
    model: Any
    with torch.device('meta'):
        if name == 'resnet':
            model = transformers.ResNetModel(transformers.ResNetConfig())
            expected = [
                f'encoder.stages.{s}.layers.{b}.layer.{i}.activation'
                for s, n in ((2, 6), (3, 3))
                for b in range(n)
                for i in (0, 1)
            ]
        elif name == 'vit':
            model = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=4))
            expected = []
        else:
            model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=4, vocab_size=50))
            expected = [f'encoder.layer.{i}.intermediate.intermediate_act_fn' for i in (2, 3)]
    x = torch.zeros(2, 7, dtype=torch.long) if name == 'bert' else None
    found = names(model, x=x)
    assert found == expected or (not expected and len(found) == 2 and '.2.' in found[0] and '.3.' in found[1])
