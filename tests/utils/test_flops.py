"""timm_atac/utils/flops.py"""

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from timm_atac.utils.flops import FlopCounter


def test_it_counts_as_pytorch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.TransformerEncoderLayer(9, 3, 5, batch_first=True))
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad(), FlopCounter() as ours:
        model.eval()(x)
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        model(x)
    assert ours.flops == theirs.get_total_flops() > 2 * 2 * 3 * 8 * 9 * 9
