"""Width and layout of an activation's input, from an observed forward pass. Sizes coincide on purpose."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_atac.replace.trace import trace


class Net(nn.Module):
    def __init__(self, forward, *layers) -> None:
        super().__init__()
        self.layers, self.act, self.way = nn.ModuleList(layers), nn.ReLU(), forward

    def forward(self, x):
        return self.way(self, x)


def width(forward, *layers, x=None):
    net = Net(forward, *layers)
    seen = trace(net, (torch.randn(2, 3, 8, 8) if x is None else x,), {net.act})
    ((_, call),) = seen.calls()
    assert seen.on_meta
    return call.width


def test_pixel_shuffle() -> None:
    layers = nn.Conv2d(3, 16, 1), nn.PixelShuffle(2)  # 4 channels of 16 x 16
    assert width(lambda m, x: m.act(m.layers[1](m.layers[0](x))), *layers) == (4, 'NCHW')


@pytest.mark.parametrize('shape, expected', [((8, 8, 8), (8, 'NCHW')), ((8, 8), (8, 'NCHW'))])
def test_layer_norm_over_a_whole_map(shape, expected) -> None:
    layers = nn.Conv2d(3, 8, 1), nn.LayerNorm(shape)
    assert width(lambda m, x: m.act(m.layers[1](m.layers[0](x))), *layers) == expected


def test_channels_last_by_permutation() -> None:
    conv = nn.Conv2d(3, 8, 1)
    assert width(lambda m, x: m.act(m.layers[0](x).permute(0, 2, 3, 1)), conv) == (8, 'NHWC')


@pytest.mark.parametrize(
    'forward',
    [
        lambda m, x: m.act(torch.einsum('nchw->nhwc', m.layers[0](x))),
        lambda m, x: m.act(m.layers[0](x).mT.contiguous().mT),
        lambda m, x: m.act(m.layers[0](x[0])),  # one image without its batch
    ],
)
def test_unknown_where_no_layer_shows_it(forward) -> None:
    assert width(forward, nn.Conv2d(3, 8, 1)) is None


def test_attention_scores_have_no_channels() -> None:
    def forward(m, x):
        q = m.layers[0](x)
        return m.act(q @ q.transpose(1, 2)) @ q

    assert width(forward, nn.Linear(8, 6), x=torch.randn(2, 5, 8)) is None


def test_the_next_layer_shows_it_where_the_last_cannot() -> None:
    def forward(m, x):  # as LeViT: heads are joined between attention and projection
        q = m.layers[0](x).reshape(2, 5, 2, 3).transpose(1, 2)
        return m.layers[1](m.act((q @ q.mT @ q).transpose(1, 2).reshape(2, 5, 6)))

    assert width(forward, nn.Linear(8, 6), nn.Linear(6, 4), x=torch.randn(2, 5, 8)) == (6, 'NLC')


def test_nothing_is_left_on_tensors() -> None:
    def forward(m, x):
        m.last.copy_(x.contiguous()[0])
        return m.act(m.layers[0](x)) * float(m.last.mean())

    net = Net(forward, nn.Conv2d(3, 8, 1))
    net.register_buffer('last', torch.zeros(3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert not trace(net, (x,), {net.act}).on_meta
    assert not any(vars(tensor) for tensor in (x, net.last, *net.parameters()))


@pytest.mark.parametrize('function', ['conv2d', 'relu'])
def test_inputs_by_keyword(function) -> None:
    def forward(m, x):
        conv = m.layers[0]
        x = F.conv2d(input=x, weight=conv.weight) if function == 'conv2d' else conv(x)
        return F.relu(input=x) if function == 'relu' else m.act(x)

    assert width(forward, nn.Conv2d(3, 8, 1)) == (8, 'NCHW')
