"""The tags that have weights, and where: in the authors' files or in our repositories on the Hub."""

import os
from typing import Any, NamedTuple

__all__ = ['HUB_ORG', 'PUBLISHED', 'Published', 'cfg_fields']

HUB_ORG = os.environ.get('TIMM_ATAC_HUB_ORG', '').strip()
"""Owner of the repositories `HUB_ORG/ARCH.TAG` on the Hub, '' if there are none. It is read when timm is imported.

Release this package before the first push, since the cards say `pip install timm_atac`. With a default owner here, timm
then loads the published weights from the Hub.
"""


class Published(NamedTuple):
    """A file that the authors have published.

    Attributes:
        url: Its address.
        git_blob: Its git blob id, see `timm_atac.weights.pretrained.git_blob_id`.
        trained: Who trained the weights on what, as the end of a sentence.
        tensors: Hash of the tensors, see `timm_atac.weights.identity.tensor_hash`. `card.yaml` in the folder of
            `timm-atac convert` has it as `weights`. None as long as nobody has converted the file and filled it in:
            then weights are only known to be the published ones if they were loaded from the file.
    """

    url: str
    git_blob: str
    trained: str = ''
    tensors: str | None = None


_OPEN_ATAC = 'https://github.com/YimianDai/open-atac'

PUBLISHED = {
    'atac_resnet50.open_atac_in1k': Published(
        url=f'{_OPEN_ATAC}/raw/master/params/0.2141-imagenet-ResNet50_v1b_ChaATAC-155-best.params',
        git_blob='68dc6dabee84f1f42746d06553aba6bfa04615d3',
        trained="trained on ImageNet-1k by the paper's authors",
    ),
}


def cfg_fields(name: str) -> dict[str, Any]:
    """Return the fields of a pretrained cfg that say where the weights are. timm prefers the Hub to the address.

    Args:
        name: ARCH.TAG, a key of `PUBLISHED`.
    """
    fields = {'url': PUBLISHED[name].url, 'custom_load': True, 'origin_url': _OPEN_ATAC}
    return {**fields, 'hf_hub_id': f'{HUB_ORG}/{name}'} if HUB_ORG else fields
