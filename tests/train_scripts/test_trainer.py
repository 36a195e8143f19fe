"""train_scripts/ablations/trainer.py"""

from functools import partial
from typing import Any

import pytest
import torch

trainer = pytest.importorskip('ablations.trainer', reason="needs the packages of the extra 'ablation'")
numbered_images = pytest.importorskip('sample_images').numbered_images
sample_rows = pytest.importorskip('sample_rows')
AUTHORS, RUN = sample_rows.AUTHORS, sample_rows.RUN
CPU = trainer.Machine(torch.device('cpu'))


def make_trainer(run: Any = RUN, machine: Any = CPU, count: int = 24) -> Any:
    torch.manual_seed(7)  # for the images; the trainer uses the run's seed
    return trainer.Trainer(run, numbered_images(count), machine)


def state(subject: Any) -> dict[str, torch.Tensor]:
    momentum = {name: subject.optimizer.state[p]['momentum_buffer'] for name, p in subject.model.named_parameters()}
    return {**{f'momentum.{name}': tensor for name, tensor in momentum.items()}, **subject.model.state_dict()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize('epoch, lr', [(0, 0.2), (299, 0.2), (300, 0.02), (349, 0.02), (350, 0.002), (399, 0.002)])
def test_learning_rate_of_the_authors(epoch, lr) -> None:
    """`--lr 0.2 --lr-decay 0.1 --lr-decay-epoch 300,350`, tested at the first and the last update of an epoch."""
    subject = make_trainer(AUTHORS, count=3 * 128)
    assert subject.updates_per_epoch == 3
    for update in (3 * epoch, 3 * epoch + 2):
        subject.scheduler.step_update(update)
        assert subject.optimizer.param_groups[0]['lr'] == pytest.approx(lr)


def test_learning_rate_of_the_digits() -> None:
    subject = make_trainer(RUN._replace(sched='cosine', epochs=5))
    found = []
    for update in (0, 3, 9, 15):
        subject.scheduler.step_update(update)
        found.append(subject.optimizer.param_groups[0]['lr'])
    half = 0.1 * (1 + torch.cos(torch.tensor(torch.pi * 9 / 15)).item()) / 2
    assert found == pytest.approx([0.01, 0.1 * (1 + torch.cos(torch.tensor(torch.pi / 5)).item()) / 2, half, 0])


def test_optimizer_of_the_authors() -> None:
    """It has Nesterov's momentum, and weight decay on all parameters."""
    subject = make_trainer(AUTHORS, count=128)
    (group,) = subject.optimizer.param_groups
    assert isinstance(subject.optimizer, torch.optim.SGD)
    assert (group['nesterov'], group['momentum'], group['weight_decay']) == (True, 0.9, 1e-4)
    assert {id(p) for p in group['params']} == {id(p) for p in subject.model.parameters()}


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize('options', [{}, dict(precision='bfloat16'), dict(precision='float16')], ids=str)
def test_resumes_to_the_same_numbers(options, tmp_path) -> None:
    run = RUN._replace(**options)
    machine = CPU._replace(channels_last=bool(options))
    seen: list[Any] = []
    whole = make_trainer(run, machine)
    end = whole.fit(tmp_path / 'whole.safetensors', lambda progress: seen.append((progress.epoch, progress.lr)))
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert end.best_accuracy >= end.accuracy

    def kill(progress: Any) -> None:
        if progress.epoch == 3:
            raise Killed

    path = tmp_path / 'killed.safetensors'
    killed = make_trainer(run, machine)
    with pytest.raises(Killed):
        killed.fit(path, kill)
    again = make_trainer(run, machine)
    again.load(path)
    assert again.progress.epoch == 2
    rest: list[int] = []
    found = again.fit(path, lambda progress: rest.append(progress.epoch))
    assert rest == [3]
    assert_equal(state(again), state(whole))
    assert found[:-2] == end[:-2]  # all fields but the times
    assert again.scaler.state_dict() == whole.scaler.state_dict()


def test_seeds_differ_and_repeat(tmp_path) -> None:
    runs = [make_trainer(RUN._replace(seed=seed, epochs=1)) for seed in (0, 0, 1)]
    for i, run in enumerate(runs):
        run.fit(tmp_path / str(i), lambda progress: None)
    assert_equal(state(runs[1]), state(runs[0]))
    assert not torch.equal(runs[2].model.fc.weight, runs[0].model.fc.weight)


def test_checkpoint_of_another_run(tmp_path) -> None:
    path = tmp_path / 'checkpoint'
    make_trainer(RUN._replace(epochs=1)).fit(path, lambda progress: None)
    with pytest.raises(trainer.CheckpointError, match=r'belongs to another run, .*remove it, or give another --output'):
        make_trainer(RUN).load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(trainer.CheckpointError, match=r'is damaged .*: remove it'):
        make_trainer(RUN).load(path)


def test_checkpoint_that_only_the_first_process_sees(monkeypatch, tmp_path) -> None:
    subject = make_trainer(RUN, CPU._replace(rank=1, processes=2))
    monkeypatch.setattr(trainer.dist, 'broadcast', lambda tensor, source: tensor.fill_(2))
    with pytest.raises(trainer.CheckpointError, match=r'process 1 read epoch 0 .*, the first process read epoch 2'):
        subject.check_same_epoch(tmp_path / 'checkpoint')


@pytest.mark.slow
def test_compile_and_channels_last(monkeypatch, tmp_path) -> None:
    """A compiled network gets batches in channels_last, and trains to the same numbers as one that is not compiled."""
    formats = set()

    def backend(graph: Any, inputs: list[torch.Tensor]) -> Any:
        batch = next(x for x in inputs if x.shape == (8, 3, 8, 8))
        formats.add(batch.is_contiguous(memory_format=torch.channels_last))
        return graph.forward

    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=backend))
    run = RUN._replace(epochs=1, activation='relu')  # not 'atac': compiled, it rounds differently
    plain, compiled = (make_trainer(run, CPU._replace(compile=c, channels_last=True)) for c in (False, True))
    for i, subject in enumerate((plain, compiled)):
        subject.fit(tmp_path / str(i), lambda progress: None)
    assert formats == {True}
    assert_equal(state(compiled), state(plain))


def test_setup_joins_the_setups_of_all_epochs(tmp_path) -> None:
    path = tmp_path / 'checkpoint'

    def kill(progress: Any) -> None:
        if progress.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        make_trainer(machine=CPU._replace(channels_last=True)).fit(path, kill)
    again = make_trainer()
    again.load(path)
    assert (again.setup.memory_format, again.setup.mode) == ('channels_last + contiguous', 'eager')
    again.fit(path, lambda progress: None)
    third = make_trainer()
    third.load(path)
    assert third.setup == again.setup


@pytest.mark.slow
def test_progress(tmp_path) -> None:
    """Learning rates, losses and accuracy agree with the trained network."""
    subject = make_trainer(RUN._replace(epochs=8))
    seen: list[Any] = []
    end = subject.fit(tmp_path / 'checkpoint', seen.append)
    assert [progress.lr for progress in seen] == pytest.approx([0.1] * 6 + [0.01, 0.001])
    images, labels = subject.data.test
    with torch.no_grad():
        logits = subject.model.eval()(subject.data.normalize(images))
    assert end.test_loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert end.accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert 0 < end.cpu_seconds and 0 < end.seconds


def test_checkpoint_of_another_commit(monkeypatch, tmp_path) -> None:
    """A run is only resumed by the commit that started it."""
    path = tmp_path / 'checkpoint'
    monkeypatch.setattr(trainer, 'commit', lambda: 'aaa')
    make_trainer(RUN._replace(epochs=1)).fit(path, lambda progress: None)
    monkeypatch.setattr(trainer, 'commit', lambda: 'aaa-dirty')
    with pytest.raises(trainer.CheckpointError, match='by commit aaa, and this is commit aaa-dirty: check out'):
        make_trainer(RUN._replace(epochs=1)).load(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_data_stays_on_the_gpu(tmp_path) -> None:
    machine = trainer.Machine(torch.device('cuda'), channels_last=True)
    subject = trainer.Trainer(RUN._replace(precision='float16'), numbered_images(24).to(machine.device), machine)
    assert subject.data.train[0].is_cuda and subject.data.train[0].dtype == torch.uint8
    end = subject.fit(tmp_path / 'checkpoint', lambda progress: None)
    assert end.epoch == 3 and torch.isfinite(torch.tensor(end.train_loss))
