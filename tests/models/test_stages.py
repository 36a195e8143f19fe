import pytest
import timm
import torch

from timm_atac.models._stages import stage_sizes


@pytest.mark.parametrize('img_size', [224, 225, (97, 160), 33, 1])
@pytest.mark.parametrize('output_stride', [32, 16, 8])
@pytest.mark.parametrize('stem_type', ['', 'deep'])
def test_sizes_are_those_of_the_resnet(img_size, output_stride, stem_type) -> None:
    with torch.device('meta'):
        model = timm.create_model(
            'resnet10t', stem_type=stem_type, features_only=True, out_indices=(1, 2, 3, 4), output_stride=output_stride
        )
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        maps = model.eval()(torch.empty(1, 3, height, width))
    assert stage_sizes(img_size, 4, output_stride) == [tuple(x.shape[-2:]) for x in maps]


@pytest.mark.parametrize('img_size', [0, (224,), (224, -1), 224.0, '224', (1, 2, 3)])
def test_errors(img_size) -> None:
    with pytest.raises(ValueError, match=r'img_size=.*: expected height and width'):
        stage_sizes(img_size, 4)
