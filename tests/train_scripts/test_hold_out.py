"""Training images are held out: image_data.py and ablation.py --hold-out."""

from typing import Any

import pytest
import torch

run_ablation = pytest.importorskip('run_ablation', reason="needs the packages of the extra 'ablation'")
run, rows = run_ablation.run, run_ablation.rows
ablation = pytest.importorskip('ablation')
image_data = pytest.importorskip('ablations.image_data')
numbered_images = pytest.importorskip('sample_images').numbered_images


@pytest.mark.slow
def test_hold_out_never_looks_at_the_test_set(tmp_path, monkeypatch) -> None:
    """The accuracy is that of the held-out images. The test set may be empty."""
    load = ablation.load
    held_out = []

    def without_test_set(*args: Any) -> Any:
        data = load(*args)
        held_out.append(image_data.hold_out(data, 300).test[0])
        return data._replace(test=(torch.zeros(0, *data.test[0].shape[1:], dtype=torch.uint8), data.test[1][:0]))

    trained = []
    trainer = ablation.Trainer

    def record_data(run: Any, data: Any, machine: Any) -> Any:
        trained.append(data)
        return trainer(run, data, machine)

    monkeypatch.setattr(ablation, 'load', without_test_set)
    monkeypatch.setattr(ablation, 'Trainer', record_data)
    run('--acts', 'relu', '--seeds', 1, '--epochs', 4, '--hold-out', 300, '--export', '--output', tmp_path)
    (data,) = trained
    assert torch.equal(data.test[0], held_out[0]) and len(data.train[0]) == 700
    (found,) = rows(tmp_path)
    assert found.run.held_out == 300 and found.result.accuracy > 60
    card = (tmp_path / found.run.name / 'README.md').read_text()
    assert 'held out of training (300 images)' in card and 'held out: 300 of the training images' in card
    assert f'computed on: {found.setup.device}' in card


def test_hold_out() -> None:
    """The same training images replace the test set each time. They are no longer in the training set."""
    data = numbered_images(23)._replace(test=numbered_images(5).test)
    found, again = image_data.hold_out(data, 6), image_data.hold_out(data, 6)
    assert (len(found.train[0]), len(found.test[0])) == (17, 6)
    labels = torch.cat([found.train[1], found.test[1]])  # each image has its own
    assert sorted(labels.tolist()) == list(range(23))
    for images, numbers in (found.train, found.test):
        assert torch.equal(images, data.train[0][numbers])
    assert torch.equal(again.test[1], found.test[1])
    assert image_data.hold_out(data, 0) is data
    with pytest.raises(image_data.DataError, match='--hold-out 23: expected fewer than the 23 training images'):
        image_data.hold_out(data, 23)
