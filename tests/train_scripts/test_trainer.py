"""train_scripts/ablations/trainer.py and grid.py"""

from functools import partial
from typing import Any

import pytest
import torch
from test_image_data import make

from timm_atac import ATAC

training = pytest.importorskip('ablations.trainer', reason="needs the packages of the extra 'ablation'")
grid = pytest.importorskip('ablations.grid')

RUN = grid.Run(
    'digits',
    'atac',
    1,
    4,
    3,
    epochs=3,
    batch_size=8,
    lr=0.1,
    weight_decay=1e-4,
    size=8,
    augment=True,
    sched='multistep',
)
AUTHORS = grid.Run('cifar100', 'relu', 1, 4, seed=0, **grid.RECIPES['authors']._asdict())
CPU = training.Machine(torch.device('cpu'))


def trainer(run: Any = RUN, machine: Any = CPU, count: int = 24) -> Any:
    torch.manual_seed(7)  # for the data; the trainer's own seed is the run's
    return training.Trainer(run, make(count), machine)


def state(trainer: Any) -> dict[str, torch.Tensor]:
    momentum = {name: trainer.optimizer.state[p]['momentum_buffer'] for name, p in trainer.model.named_parameters()}
    return {**{f'momentum.{name}': tensor for name, tensor in momentum.items()}, **trainer.model.state_dict()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize('name', [*grid.TABLES, *grid.FIGURE, 'hard_swish'])
def test_models(name) -> None:
    run = AUTHORS._replace(activation=name, blocks=2)
    model = grid.create_model(run, 100, 3, (0.5,) * 3, (0.5,) * 3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize(
    'act_stages, expected',
    [
        (1, {'act'}),
        (2, {'act', 'stages.2'}),
        (3, {'act', 'stages.2', 'stages.1'}),
        (4, {'act', 'stages.2', 'stages.1', 'stages.0'}),
    ],
)
def test_act_stages_count_from_the_back(act_stages, expected) -> None:
    """As `--act-layers` of the authors' train_cifar.py."""
    model = grid.create_model(RUN._replace(act_stages=act_stages), 10, 1, (0.0,), (1.0,))
    assert {name[:8] for name, m in model.named_modules() if isinstance(m, ATAC)} == expected


def test_names_tell_runs_apart() -> None:
    changed = dict(
        dataset='cifar10',
        activation='nin',
        blocks=2,
        act_stages=2,
        seed=4,
        epochs=2,
        batch_size=9,
        lr=0.3,
        weight_decay=0.0,
        size=9,
        augment=False,
        sched='cosine',
        precision='bfloat16',
        processes=2,
        held_out=5,
    )
    assert changed.keys() == set(RUN._fields)
    others: list[dict[str, Any]] = [{key: value} for key, value in changed.items()]
    others += [dict(dataset=name) for name in ('/a/x', '/b/x')]
    names = [RUN.name, *(RUN._replace(**other).name for other in others)]
    assert not any('/' in name for name in names)
    assert len(set(names)) == len(names)
    assert AUTHORS.name == 'cifar100_relu_b1_seed0'


@pytest.mark.parametrize('epoch, lr', [(0, 0.2), (299, 0.2), (300, 0.02), (349, 0.02), (350, 0.002), (399, 0.002)])
def test_learning_rate_of_the_authors(epoch, lr) -> None:
    """`--lr 0.2 --lr-decay 0.1 --lr-decay-epoch 300,350`, at the first and the last update of an epoch."""
    subject = trainer(AUTHORS, count=3 * 128)
    assert subject.updates_per_epoch == 3
    for update in (3 * epoch, 3 * epoch + 2):
        subject.scheduler.step_update(update)
        assert subject.optimizer.param_groups[0]['lr'] == pytest.approx(lr)


def test_learning_rate_of_the_digits() -> None:
    subject = trainer(RUN._replace(sched='cosine', epochs=5))
    found = []
    for update in (0, 3, 9, 15):
        subject.scheduler.step_update(update)
        found.append(subject.optimizer.param_groups[0]['lr'])
    half = 0.1 * (1 + torch.cos(torch.tensor(torch.pi * 9 / 15)).item()) / 2
    assert found == pytest.approx([0.01, 0.1 * (1 + torch.cos(torch.tensor(torch.pi / 5)).item()) / 2, half, 0])


def test_optimizer_of_the_authors() -> None:
    """Nesterov's momentum, and weight decay on norms and biases too."""
    subject = trainer(AUTHORS, count=128)
    (group,) = subject.optimizer.param_groups
    assert isinstance(subject.optimizer, torch.optim.SGD)
    assert (group['nesterov'], group['momentum'], group['weight_decay']) == (True, 0.9, 1e-4)
    assert {id(p) for p in group['params']} == {id(p) for p in subject.model.parameters()}


class Killed(BaseException):
    pass


@pytest.mark.parametrize('options', [{}, dict(precision='bfloat16'), dict(precision='float16')], ids=str)
def test_goes_on_to_the_same_numbers(options, tmp_path) -> None:
    run = RUN._replace(**options)
    machine = CPU._replace(channels_last=bool(options))
    seen: list[Any] = []
    whole = trainer(run, machine)
    end = whole.fit(tmp_path / 'whole.safetensors', lambda progress: seen.append((progress.epoch, progress.lr)))
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert end.best_accuracy >= end.accuracy

    def kill(progress: Any) -> None:
        if progress.epoch == 3:
            raise Killed

    path = tmp_path / 'killed.safetensors'
    killed = trainer(run, machine)
    with pytest.raises(Killed):
        killed.fit(path, kill)
    again = trainer(run, machine)
    again.load(path)
    assert again.progress.epoch == 2
    rest: list[int] = []
    found = again.fit(path, lambda progress: rest.append(progress.epoch))
    assert rest == [3]
    assert_equal(state(again), state(whole))
    assert found[:-2] == end[:-2]  # all but the seconds
    assert again.scaler.state_dict() == whole.scaler.state_dict()


def test_seeds_differ_and_repeat(tmp_path) -> None:
    runs = [trainer(RUN._replace(seed=seed, epochs=1)) for seed in (0, 0, 1)]
    for i, run in enumerate(runs):
        run.fit(tmp_path / str(i), lambda progress: None)
    assert_equal(state(runs[1]), state(runs[0]))
    assert not torch.equal(runs[2].model.fc.weight, runs[0].model.fc.weight)


def test_checkpoint_of_another_run(tmp_path) -> None:
    path = tmp_path / 'checkpoint'
    trainer(RUN._replace(epochs=1)).fit(path, lambda progress: None)
    with pytest.raises(training.CheckpointError, match=r'is of another run, .*remove it, or give another --output'):
        trainer(RUN).load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(training.CheckpointError, match=r'is damaged .*: remove it'):
        trainer(RUN).load(path)


def test_checkpoint_that_only_the_first_process_sees(monkeypatch, tmp_path) -> None:
    subject = trainer(RUN, CPU._replace(rank=1, processes=2))
    monkeypatch.setattr(training.dist, 'broadcast', lambda tensor, source: tensor.fill_(2))
    with pytest.raises(training.CheckpointError, match=r'process 1 has epoch 0 in .*, the first process has 2'):
        subject.agree(tmp_path / 'checkpoint')


def test_compile_and_channels_last(monkeypatch, tmp_path) -> None:
    """What is compiled sees batches in channels_last, and trains as what is not."""
    formats = set()

    def backend(graph: Any, inputs: list[torch.Tensor]) -> Any:
        batch = next(x for x in inputs if x.shape == (8, 3, 8, 8))
        formats.add(batch.is_contiguous(memory_format=torch.channels_last))
        return graph.forward

    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=backend))
    run = RUN._replace(epochs=1, activation='relu')  # a unit runs by its parts where it is compiled: other last bits
    plain, compiled = (trainer(run, CPU._replace(compile=c, channels_last=True)) for c in (False, True))
    for i, subject in enumerate((plain, compiled)):
        subject.fit(tmp_path / str(i), lambda progress: None)
    assert formats == {True}
    assert_equal(state(compiled), state(plain))


def test_recipes_by_name() -> None:
    short = AUTHORS._replace(**grid.RECIPES['short']._asdict())
    assert (AUTHORS.recipe, short.recipe, short._replace(lr=0.3).recipe) == ('authors', 'short', 'authors')
    assert short.unusual() == {'recipe': 'short'}
    assert short.name == 'cifar100_relu_b1_seed0_recipe-short'
    assert AUTHORS._replace(lr=0.3).unusual() == {'lr': 0.3}
    assert AUTHORS._replace(dataset='digits').unusual() == {'recipe': 'authors'}


def test_setup_is_that_of_all_epochs(tmp_path) -> None:
    path = tmp_path / 'checkpoint'

    def kill(progress: Any) -> None:
        if progress.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        trainer(machine=CPU._replace(channels_last=True)).fit(path, kill)
    again = trainer()
    again.load(path)
    assert (again.setup.memory_format, again.setup.mode) == ('channels_last + contiguous', 'eager')
    again.fit(path, lambda progress: None)
    third = trainer()
    third.load(path)
    assert third.setup == again.setup


def test_progress(tmp_path) -> None:
    """Learning rates, losses and accuracy against the network itself."""
    subject = trainer(RUN._replace(epochs=8))
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
    """Rows name one commit: a run does not go on with other code."""
    path = tmp_path / 'checkpoint'
    monkeypatch.setattr(training, 'commit', lambda: 'aaa')
    trainer(RUN._replace(epochs=1)).fit(path, lambda progress: None)
    monkeypatch.setattr(training, 'commit', lambda: 'aaa-dirty')
    with pytest.raises(training.CheckpointError, match='by the code of commit aaa, and this is aaa-dirty: check that'):
        trainer(RUN._replace(epochs=1)).load(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_data_stays_on_the_gpu(tmp_path) -> None:
    machine = training.Machine(torch.device('cuda'), channels_last=True)
    subject = training.Trainer(RUN._replace(precision='float16'), make(24).to(machine.device), machine)
    assert subject.data.train[0].is_cuda and subject.data.train[0].dtype == torch.uint8
    end = subject.fit(tmp_path / 'checkpoint', lambda progress: None)
    assert end.epoch == 3 and torch.isfinite(torch.tensor(end.train_loss))
