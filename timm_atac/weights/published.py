"""Which tags have weights, where those are (the authors' files, our repositories on the Hub), and how they come in."""

import os
from typing import Any, NamedTuple

__all__ = ['HUB_ORG', 'PUBLISHED', 'Published', 'source']

HUB_ORG = os.environ.get('TIMM_ATAC_HUB_ORG', '').strip()
"""Owner of the repositories `HUB_ORG/ARCH.TAG` on the Hub, '' while there are none; read when timm is imported."""


class Published(NamedTuple):
    """A file of the authors' on the network.

    Attributes:
        url: Where it is.
        git_blob: Its git blob id, SHA-1 of `b'blob %d\\0' % size` and the bytes, in hexadecimal.
    """

    url: str
    git_blob: str


_OPEN_ATAC = 'https://github.com/YimianDai/open-atac'

PUBLISHED = {
    'atac_resnet50.open_atac_in1k': Published(
        url=f'{_OPEN_ATAC}/raw/master/params/0.2141-imagenet-ResNet50_v1b_ChaATAC-155-best.params',
        git_blob='68dc6dabee84f1f42746d06553aba6bfa04615d3',
    ),
}


def source(name: str) -> dict[str, Any]:
    """The fields of a pretrained cfg that say where the weights are; of the two, timm prefers the Hub.

    Args:
        name: ARCH.TAG, a key of `PUBLISHED`.
    """
    fields = {'url': PUBLISHED[name].url, 'custom_load': True, 'origin_url': _OPEN_ATAC}
    return {**fields, 'hf_hub_id': f'{HUB_ORG}/{name}'} if HUB_ORG else fields
