"""Small networks of each kind that docs/deploy.md names, and images for them."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from measuring.serving import with_trained_norms

from timm_atac import replace_activations

SHALLOW: dict[str, Any] = {'layers': (1, 1, 1, 1), 'num_classes': 10}
NETWORKS: dict[str, tuple[Callable[[], Any], int]] = {  # what creates it, and the size of its images
    'atac_resnet18': (lambda: timm.create_model('atac_resnet18', **SHALLOW), 64),
    'atac_resnet50': (lambda: timm.create_model('atac_resnet50', **SHALLOW), 64),
    'atac_resnet8_cifar': (lambda: timm.create_model('atac_resnet8_cifar'), 32),
    'se_act': (lambda: timm.create_model('resnet8_cifar', act_layer='se_act'), 32),
    'nin': (lambda: timm.create_model('resnet8_cifar', act_layer='nin'), 32),
    'xunit': (lambda: timm.create_model('resnet8_cifar', act_layer='xunit'), 32),
    'local_se': (lambda: timm.create_model('resnet8_cifar', attn_layer='local_se'), 32),
    'fa_resnet50': (lambda: timm.create_model('fa_resnet50', **SHALLOW), 64),
    'aa_resnet50': (lambda: timm.create_model('aa_resnet50', img_size=64, **SHALLOW), 64),
    'ge_plus_resnet50': (lambda: timm.create_model('ge_plus_resnet50', img_size=64, **SHALLOW), 64),
    'replaced': (lambda: replace_activations(timm.create_model('efficientnet_b0', num_classes=10)), 64),
    'by name': (lambda: timm.create_model('mobilenetv3_small_050', act_layer='atac', num_classes=10), 64),
}


def network(name: str) -> tuple[Any, torch.Tensor]:
    """Return the network in eval mode with norms as after training, and four images."""
    create, size = NETWORKS[name]
    # the statistics of few images make units with global pooling amplify rounding errors
    return with_trained_norms(create(), torch.randn(16, 3, size, size)), torch.randn(4, 3, size, size)


def difference(y: Any, expected: torch.Tensor) -> float:
    """Return the largest difference, divided by the largest expected output."""
    y, expected = torch.as_tensor(y).double(), expected.detach().double()
    return ((y - expected).abs().max() / expected.abs().max()).item()
