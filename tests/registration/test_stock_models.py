"""timm's own models with and without us."""

from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.slow
def test_stock_models_are_unchanged(python, tmp_path) -> None:
    """They draw the same weights and compute the same function, up to the rounding of two processes."""
    code = """
        import sys, timm, torch
        from safetensors.torch import save_file
        for name in ('test_resnet', 'test_efficientnet', 'test_vit', 'resnet18', 'mobilenetv3_small_050'):
            torch.manual_seed(0)
            model = timm.create_model(name).eval()
            with torch.inference_mode():
                outputs = model(torch.randn(1, *model.default_cfg['input_size']))
            print(name, *model.state_dict())
            outputs = outputs / outputs.std()  # some are as small as the tolerance
            save_file({**model.state_dict(), 'outputs': outputs}, f'{FOLDER}/{name}.safetensors')
        print('timm_atac.units.atac' in sys.modules)
    """
    found = {}
    for disabled in ('0', '1'):
        folder = tmp_path / disabled
        folder.mkdir()
        result = python(f'FOLDER = {str(folder)!r}\n{dedent(code)}', TIMM_ATAC_DISABLE=disabled)
        found[disabled] = result.stdout.splitlines(), {path.stem: load_file(path) for path in sorted(folder.iterdir())}
    ((*names, with_us), ours), ((*their_names, without_us), theirs) = found.values()
    assert (with_us, without_us) == ('True', 'False')
    assert names == their_names and len(names) == len(ours) == 5
    for name, tensors in theirs.items():
        torch.testing.assert_close(ours[name], tensors, msg=f'{name}: {{}}'.format)
