"""The tags that have weights, and where: in the authors' files, in this package, or in our repositories on the Hub."""

import os
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ['HUB_ORG', 'PUBLISHED', 'Published', 'cfg_fields', 'packaged_file', 'packaged_name']

HUB_ORG = os.environ.get('TIMM_ATAC_HUB_ORG', '').strip()
"""Owner of the repositories `HUB_ORG/ARCH.TAG` on the Hub, '' if there are none. It is read when timm is imported.

Release this package before the first push, since the cards say `pip install timm_atac`. With a default owner here, timm
then loads the published weights from the Hub.
"""


class Published(NamedTuple):
    """Weights that a tag stands for: a file that the authors have published, or a safetensors file in this package.

    Attributes:
        url: Address of the authors' file, '' for a file in this package.
        git_blob: Git blob id of the authors' file, see `timm_atac.weights.pretrained.git_blob_id`.
        trained: Who trained the weights on what, as the end of a sentence.
        tensors: Hash of the tensors, see `timm_atac.weights.identity.tensor_hash`. `card.yaml` in the folder of
            `timm-atac convert` has it as `weights`. None as long as nobody has converted the file and filled it in:
            then weights are only known to be the published ones if they were loaded from the file.
    """

    url: str = ''
    git_blob: str = ''
    trained: str = ''
    tensors: str | None = None


_OPEN_ATAC = 'https://github.com/YimianDai/open-atac'
_FILES = Path(__file__).with_name('files')
_ON_CIFAR10 = 'trained on the JPEG copy of CIFAR-10 by the authors of timm_atac'

PUBLISHED = {
    'atac_resnet50.open_atac_in1k': Published(
        url=f'{_OPEN_ATAC}/raw/master/params/0.2141-imagenet-ResNet50_v1b_ChaATAC-155-best.params',
        git_blob='68dc6dabee84f1f42746d06553aba6bfa04615d3',
        trained="trained on ImageNet-1k by the paper's authors",
    ),
    # `python tools/package_weights.py` writes the files, and prints these lines
    'resnet8_cifar.cifar10': Published(
        trained=_ON_CIFAR10, tensors='ae57350b8d8bd5f95d23e786f4857c5d3aa126cac42625dc94d0b9f792973e56'
    ),
    'atac_resnet8_cifar.cifar10': Published(
        trained=_ON_CIFAR10, tensors='01b349668f2128ca39f2776c1352c71ada829c52cc261d525f79758a3d59f902'
    ),
    'resnet14_cifar.cifar10': Published(
        trained=_ON_CIFAR10, tensors='bb632f1a8c02fcb0ef230ede643a790844d37ce42a373855c24b419f6470d23e'
    ),
    'atac_resnet14_cifar.cifar10': Published(
        trained=_ON_CIFAR10, tensors='d0960ac68a8c2cf4212bd2f3cf26fd34c738431816cdc155757090276bfa347c'
    ),
    'resnet20_cifar.cifar10': Published(
        trained=_ON_CIFAR10, tensors='34a13fd54ae79f54788763cb6b66415b3cfc57a68051ab4adebf3ba6023f2a25'
    ),
}


def cfg_fields(name: str) -> dict[str, Any]:
    """Return the fields of a pretrained cfg that say where the weights are, {} if the tag has none.

    timm prefers a file to the Hub, and the Hub to an address. So the weights in this package are loaded with
    `TIMM_ATAC_HUB_ORG` too.

    Args:
        name: ARCH.TAG.
    """
    if name not in PUBLISHED:
        return {}
    if file := packaged_file(name):
        return {'file': str(file), 'license': 'apache-2.0'}
    fields = {'url': PUBLISHED[name].url, 'custom_load': True, 'origin_url': _OPEN_ATAC}
    return {**fields, 'hf_hub_id': f'{HUB_ORG}/{name}'} if HUB_ORG else fields


def packaged_file(name: str) -> Path | None:
    """Return the file in this package with the weights of ARCH.TAG, None if they are not in it."""
    return _FILES / f'{name}.safetensors' if name in PUBLISHED and not PUBLISHED[name].git_blob else None


def packaged_name(file: Any) -> str | None:
    """Return ARCH.TAG of a file in this package, None for any other path and what is no path."""
    if not isinstance(file, (str, os.PathLike)) or Path(file).parent != _FILES:
        return None
    return Path(file).stem
