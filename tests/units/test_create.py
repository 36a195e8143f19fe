from functools import partial
from typing import Any

import pytest
import torch
import torch.nn as nn
from timm.layers import SEModule, create_act_layer, get_act_layer

from timm_atac import ATAC, ATACMe, NiN, SEActivation
from timm_atac.units.checks import check_stages
from timm_atac.units.create import create_activation


@pytest.mark.parametrize('name, unit', [('atac', ATACMe), ('se_act', SEActivation), ('nin', NiN), ('ATAC', ATACMe)])
def test_names_in_timm(name, unit) -> None:
    assert get_act_layer(name) is unit
    created = create_act_layer(name, channels=64, inplace=True)
    assert type(created) is unit
    assert created.conv1.weight.shape == (32, 64, 1, 1)


@pytest.mark.parametrize(
    'act_layer, expected',
    [
        ('atac', ATACMe),
        (ATAC, ATAC),
        (partial(ATAC, rd_ratio=0.25), ATAC),
        ('se_act', SEActivation),
        ('nin', NiN),
        ('relu', nn.ReLU),
        (nn.Tanh, nn.Tanh),
        ('prelu', nn.PReLU),
        (SEModule, SEModule),
        (None, nn.Identity),
    ],
)
def test_create(act_layer, expected) -> None:
    activation = create_activation(act_layer, 24)
    assert isinstance(activation, expected)
    assert activation(torch.randn(2, 24, 3, 3)).shape == (2, 24, 3, 3)


def test_options_go_where_they_are_taken() -> None:
    activation: Any = create_activation(
        'atac', 24, rd_ratio=0.25, norm_layer=nn.InstanceNorm2d, device='meta', dtype=torch.float16
    )
    assert activation.conv1.weight.shape == (6, 24, 1, 1)
    assert (activation.conv1.weight.device.type, activation.conv1.weight.dtype) == ('meta', torch.float16)
    assert isinstance(activation.bn2, nn.InstanceNorm2d)
    own: Any = create_activation(partial(ATAC, norm_layer=None), 24, norm_layer=nn.InstanceNorm2d)
    assert isinstance(own.bn1, nn.Identity)


@pytest.mark.parametrize(
    'act_layer, message',
    [
        ('relu', "rd_ratio=0.5 was given with act_layer='relu', which has no bottleneck"),
        (partial(ATAC, rd_ratio=0.25), 'which already has a rd_ratio'),
    ],
)
def test_rd_ratio_is_never_dropped(act_layer, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_activation(act_layer, 24, rd_ratio=0.5)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="act_layer='atak': timm has no activation of that name"):
        create_activation('atak', 24)


@pytest.mark.parametrize('given, expected', [((3, 4), (3, 4)), ([4, 1], (1, 4)), ((), ()), (range(1, 5), (1, 2, 3, 4))])
def test_stages(given, expected) -> None:
    assert check_stages(given, 4) == expected


@pytest.mark.parametrize('act_layer', ['prelu', nn.PReLU, partial(ATAC, act_layer='prelu', gate_layer='prelu')])
def test_device_and_dtype_reach_every_parameter(act_layer) -> None:
    activation = create_activation(act_layer, 24, device='meta', dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in activation.parameters()} == {('meta', torch.float16)}


def test_norm_layer_is_for_our_units() -> None:
    assert isinstance(create_activation(SEModule, 24, norm_layer=nn.BatchNorm2d).bn, nn.Identity)
    assert isinstance(create_activation(partial(NiN), 24, norm_layer=nn.InstanceNorm2d).bn1, nn.InstanceNorm2d)


@pytest.mark.parametrize('given', [3, '34', ([3],), (0,), (5,), (3, 3), (2.0,), (True,), ('3',), None])
def test_wrong_stages(given) -> None:
    with pytest.raises(ValueError, match=r'expected a tuple of different stage numbers from \(1, 2, 3, 4\)'):
        check_stages(given, 4)
