"""docs/any_model.md agrees with tools/any_model.py."""

import any_model
import pytest

PAGE = any_model.PAGE.read_text()
QUICK = ('resnet50', 'efficientnet_b0', 'vgg16', "torchvision's `resnet50`")


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[] if name in QUICK else pytest.mark.all_hosts) for name in any_model.MODELS]
)
def test_row(name) -> None:
    if name.startswith('transformers'):
        pytest.importorskip('transformers')
    row = any_model.row(name)
    if name.startswith('transformers'):  # versions of it have different names
        cells = row.split(' | ')
        assert ' | '.join(cells[:2]) in PAGE and ' | '.join(cells[4:]) in PAGE
    else:
        assert row in PAGE, 'run python tools/any_model.py'


def test_every_model_has_a_row() -> None:
    rows = PAGE.partition(any_model.HEAD)[2].partition('\n\n')[0]
    assert rows.count('\n') + 1 == len(any_model.MODELS)


def test_another_table() -> None:
    new = f'{any_model.HEAD}| new |\n'
    assert any_model.with_table(f'a\n{any_model.HEAD}| old |\n| old |\n\nb\n', new) == f'a\n{new}\nb\n'
