"""train_scripts/ablations/cuda_graph.py"""

import pytest
import torch

trainer = pytest.importorskip('ablations.trainer', reason="needs the packages of the extra 'ablation'")
numbered_images = pytest.importorskip('sample_images').numbered_images
RUN = pytest.importorskip('sample_rows').RUN


@pytest.mark.parametrize(
    'changed, precision, expected',
    [
        ({}, 'float32', True),
        ({}, 'bfloat16', True),
        ({}, 'float16', False),
        ({'processes': 2}, 'float32', False),
        ({'compile': True}, 'float32', False),
        ({'cuda_graph': False}, 'float32', False),
        ({'device': torch.device('cpu')}, 'float32', False),
    ],
)
def test_which_runs_are_graphed(changed, precision, expected) -> None:
    machine = trainer.Machine(torch.device('cuda'), compile=None, cuda_graph=None)._replace(**changed)
    assert machine.should_graph(precision) is expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('activation', ['relu', 'atac', 'se_act'])
@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_it_trains_to_the_numbers_of_the_eager_network(activation, precision, tmp_path, monkeypatch) -> None:
    """Also the running statistics, which the passes before the capture must not change."""
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    device = torch.device('cuda')
    run = RUN._replace(activation=activation, precision=precision)
    ends, subjects = [], []
    for cuda_graph in (False, None):
        torch.manual_seed(7)  # for the images; the trainer uses the run's seed
        machine = trainer.Machine(device, cuda_graph=cuda_graph)
        subject = trainer.Trainer(run, numbered_images(24).to(device), machine)
        ends.append(subject.fit(tmp_path / str(cuda_graph), lambda progress: None))
        subjects.append(subject)
    eager, graphed = subjects
    assert (eager.setup.mode, graphed.setup.mode) == ('eager', 'cuda graph')
    rtol, atol = (1e-4, 1e-5) if precision == 'float32' else (2e-2, 2e-3)
    torch.testing.assert_close(graphed.model.state_dict(), eager.model.state_dict(), rtol=rtol, atol=atol)
    assert ends[1].train_loss == pytest.approx(ends[0].train_loss, rel=rtol)
