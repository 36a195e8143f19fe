"""The training of one run: its network, its checkpoints, and how it resumes to the same numbers."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import distribute_bn, random_seed
from torch.nn.parallel import DistributedDataParallel

from ablations.cuda_graph import GradientGraph
from ablations.grid import Run, create_model
from ablations.image_data import ImageData, batches
from ablations.provenance import Setup, commit, data_hash, device_name, join_setups, pillow_version
from timm_atac._files import replaced_file

EVAL_BATCH_SIZE = 500
COMPILE_FROM = 1000  # a CPU run with fewer updates takes longer to compile than it saves


class CheckpointError(Exception):
    """A run cannot be resumed from its checkpoint."""


class Machine(NamedTuple):
    """The device of this process, the processes of torchrun, and how the network runs.

    Attributes:
        device: Device of this process.
        rank, processes: Rank of this process and number of processes of torchrun; 0 and 1 without torchrun.
        channels_last: True if images and weights have this memory layout, as in timm's train.py.
        compile: True to use `torch.compile`, False not to. None uses it where it was measured to save time: in long
            runs on a CPU.
        cuda_graph: True to compute the gradients as one CUDA graph, False not to. None does so where it can.
    """

    device: torch.device
    rank: int = 0
    processes: int = 1
    channels_last: bool = False
    compile: bool | None = False
    cuda_graph: bool | None = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def should_compile(self, updates: int) -> bool:
        """True if a run with this number of updates uses `torch.compile`."""
        if self.compile is not None:
            return self.compile
        return self.device.type == 'cpu' and updates >= COMPILE_FROM and _has_compiler()

    def should_graph(self, precision: str) -> bool:
        """True if a run with this precision computes its gradients as one CUDA graph.

        The scale of the loss in float16, the communication of several processes and `torch.compile` are not captured.
        """
        can = self.device.type == 'cuda' and self.processes == 1 and precision != 'float16' and not self.compile
        return can and self.cuda_graph is not False


def _has_compiler() -> bool:
    """True if the C++ compiler that PyTorch calls is installed."""
    return shutil.which(os.environ.get('CXX') or ('clang++' if sys.platform == 'darwin' else 'g++')) is not None


class Progress(NamedTuple):
    """The state of a run after an epoch.

    Attributes:
        epoch: Number of finished epochs.
        lr: Learning rate of the last update.
        train_loss: Mean cross-entropy over the epoch.
        test_loss: Mean cross-entropy on the test set.
        accuracy, best_accuracy: Top-1 on the test set in per cent, after this epoch and the highest so far.
        seconds: Wall-clock time of all epochs. It includes time in which the process was stopped.
        cpu_seconds: CPU time of the first process.
    """

    epoch: int = 0
    lr: float = 0.0
    train_loss: float = 0.0
    test_loss: float = 0.0
    accuracy: float = 0.0
    best_accuracy: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Trainer:
    """Trains the network of one run.

    The random numbers of an epoch only depend on the run's seed and the epoch's number. A checkpoint therefore needs no
    random state.

    Args:
        run: The settings.
        data: The data set, on the device.
        machine: The same in every process, except for `rank` and `device`.
    """

    def __init__(self, run: Run, data: ImageData, machine: Machine) -> None:
        self.run, self.data, self.machine = run, data, machine
        self.progress = Progress()
        random_seed(run.seed)
        model = create_model(run, len(data.classes), data.in_chans, data.mean, data.std)
        self.model = model.to(machine.device).to(memory_format=machine.memory_format)
        self.optimizer = create_optimizer_v2(  # timm's 'sgd' has Nesterov's momentum
            self.model, 'sgd', run.lr, run.weight_decay, momentum=0.9, filter_bias_and_bn=False
        )
        self.updates_per_epoch = len(data.train[0]) // run.batch_size
        self.compiled = machine.should_compile(run.epochs * self.updates_per_epoch)
        self.graphed = machine.should_graph(run.precision)
        self._setups = [
            Setup(
                device_name(machine.device),
                'channels_last' if machine.channels_last else 'contiguous',
                'compiled' if self.compiled else 'cuda graph' if self.graphed else 'eager',
                commit(),
                data_hash([*data.train, *data.test]),
                pillow=pillow_version(),
            )
        ]
        self.scheduler = self._create_scheduler()
        # the gradients of float16 need loss scaling
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=run.precision == 'float16')

    @property
    def setup(self) -> Setup:
        """The setups of all epochs so far, joined."""
        return join_setups(self._setups)

    def _create_scheduler(self) -> Any:
        run = self.run
        options: dict[str, Any] = dict(sched='multistep', warmup_epochs=0)
        # timm divides one update before the milestone; half an update later, it divides at the milestone
        half_update = 0.5 / self.updates_per_epoch
        options.update(decay_milestones=[run.epochs * share + half_update for share in (3 / 4, 7 / 8)], decay_rate=0.1)
        if run.sched == 'cosine':
            options = dict(sched='cosine', warmup_epochs=min(1, run.epochs - 1), warmup_lr=run.lr / 10)
        scheduler, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=run.epochs,
            step_on_epochs=False,
            updates_per_epoch=self.updates_per_epoch,
            **options,
        )
        return scheduler

    def fit(self, checkpoint: Path, after_epoch: Callable[[Progress], None]) -> Progress:
        """Train all epochs that are left.

        Args:
            checkpoint: File that is replaced after each epoch.
            after_epoch: Called with the progress in the first process, before the checkpoint is written.
        """
        network = self.wrap_model()
        while self.progress.epoch < self.run.epochs:
            start, cpu_start = time.perf_counter(), time.process_time()
            train_loss = self.train_epoch(network)
            if self.machine.processes > 1:
                distribute_bn(self.model, self.machine.processes, reduce=True)
            accuracy, test_loss = self._evaluate()
            self.progress = Progress(
                self.progress.epoch + 1,
                self._lr,
                train_loss,
                test_loss,
                accuracy,
                max(accuracy, self.progress.best_accuracy),
                self.progress.seconds + time.perf_counter() - start,
                self.progress.cpu_seconds + time.process_time() - cpu_start,
            )
            if self.machine.rank == 0:
                # called first: if the process is killed before `save`, it is called again and not left out
                after_epoch(self.progress)
                self.save(checkpoint)
            if self.machine.processes > 1:
                dist.barrier()  # no process starts the next epoch before the checkpoint is written
        return self.progress

    def wrap_model(self) -> nn.Module | GradientGraph:
        """Return the network to train: distributed if there are several processes, compiled if `self.compiled`.

        If `self.graphed`, it is the graph of the network's gradients.
        """
        if self.graphed:
            return GradientGraph(self.model, partial(self._loss, self.model))
        network: Any = self.model
        if self.machine.processes > 1:
            network = DistributedDataParallel(network)
        if self.compiled:  # after DDP, so that its communication overlaps with the compiled backward pass
            torch.compiler.reset()  # forget the networks of earlier runs
            network = torch.compile(network)
        return network

    def _autocast(self) -> Any:
        if self.run.precision == 'float32':
            return nullcontext()
        # a graph must not use copies of the weights that were cached before its capture
        dtype, device = getattr(torch, self.run.precision), self.machine.device.type
        return torch.autocast(device, dtype, cache_enabled=not self.graphed)

    def _loss(self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            return F.cross_entropy(network(images.contiguous(memory_format=self.machine.memory_format)), labels)

    def _gradients(
        self, network: nn.Module | GradientGraph, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Set the gradients of a batch, and return its loss."""
        if isinstance(network, GradientGraph):
            return network(images, labels)
        loss = self._loss(network, images, labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        return loss.detach()

    def train_epoch(self, network: nn.Module | GradientGraph) -> float:
        """Train one epoch of what `wrap_model` returned, and return its mean loss."""
        run, machine = self.run, self.machine
        epoch_seed = (run.seed << 20) + self.progress.epoch
        random_seed(epoch_seed)
        self.model.train()
        total = torch.zeros((), device=machine.device)
        updates = self.progress.epoch * self.updates_per_epoch
        self.scheduler.step_update(updates)
        for images, labels in batches(
            self.data, run.batch_size, run.augment, epoch_seed, machine.rank, machine.processes
        ):
            loss = self._gradients(network, images, labels)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._lr: float = self.optimizer.param_groups[0]['lr']
            updates += 1
            self.scheduler.step_update(updates)
            total += loss  # read once per epoch, since reading synchronizes with the device
        if machine.processes > 1:
            dist.all_reduce(total)
        return total.item() / (self.updates_per_epoch * machine.processes)

    @torch.inference_mode()
    def _evaluate(self) -> tuple[float, float]:
        """Return top-1 accuracy in per cent and mean cross-entropy on the test set."""
        machine = self.machine
        self.model.eval()
        images, labels = (part[machine.rank :: machine.processes] for part in self.data.test)
        totals = torch.zeros(2, dtype=torch.float32, device=machine.device)  # correct images, sum of losses
        for start in range(0, len(images), EVAL_BATCH_SIZE):
            batch = self.data.normalize(images[start : start + EVAL_BATCH_SIZE])
            with self._autocast():
                logits = self.model(batch.contiguous(memory_format=machine.memory_format))
            target = labels[start : start + EVAL_BATCH_SIZE]
            loss = F.cross_entropy(logits.float(), target, reduction='sum')
            totals += torch.stack([(logits.argmax(1) == target).sum(), loss])
        if machine.processes > 1:
            dist.all_reduce(totals)
        correct, loss_sum = totals.tolist()
        return 100 * correct / len(self.data.test[0]), loss_sum / len(self.data.test[0])

    def check_same_epoch(self, checkpoint: Path) -> None:
        """Check that all processes start from the same epoch.

        Raises:
            CheckpointError: This process has read another checkpoint than the first process.
        """
        if self.machine.processes == 1:
            return
        epoch = torch.tensor([self.progress.epoch], device=self.machine.device)
        dist.broadcast(epoch, 0)
        if epoch.item() != self.progress.epoch:
            raise CheckpointError(
                f'process {self.machine.rank} read epoch {self.progress.epoch} from {checkpoint}, the first process '
                f'read epoch {epoch.item()}: give an --output that all machines share.'
            )

    def save(self, path: Path) -> None:
        """Write everything that the next epoch needs to a safetensors file."""
        tensors = {f'model.{name}': tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            if parameter in self.optimizer.state:  # empty before the first update
                tensors[f'momentum.{name}'] = self.optimizer.state[parameter]['momentum_buffer']
        metadata = {
            'run': json.dumps(self.run),
            'progress': json.dumps(self.progress),
            'scaler': json.dumps(self.scaler.state_dict()),
            'setup': json.dumps(self.setup),
        }
        with replaced_file(path) as file:
            file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))

    def load(self, path: Path) -> None:
        """Resume from a file that `save` wrote.

        Raises:
            CheckpointError: It belongs to another run or to another commit of this repository, or is damaged.
        """
        try:
            with safe_open(path, 'pt', device=str(self.machine.device)) as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise CheckpointError(f'{path} is damaged ({error}): remove it.') from None
        if json.loads(metadata['run']) != list(self.run):
            raise CheckpointError(
                f'{path} belongs to another run, {metadata["run"]}: remove it, or give another --output.'
            )
        setup = Setup(*json.loads(metadata['setup']))
        if setup.commit != commit():
            raise CheckpointError(
                f'{path} was written by commit {setup.commit or "unknown"}, and this is commit '
                f'{commit() or "unknown"}: check out the former, or remove the file to train again from the start.'
            )
        self._setups.insert(0, setup)
        self.progress = Progress(*json.loads(metadata['progress']))
        self.scaler.load_state_dict(json.loads(metadata['scaler']))
        self.model.load_state_dict(
            {name.removeprefix('model.'): t for name, t in tensors.items() if name.startswith('model.')}
        )
        for name, parameter in self.model.named_parameters():
            if f'momentum.{name}' in tensors:
                buffer = torch.empty_like(parameter).copy_(tensors[f'momentum.{name}'])
                self.optimizer.state[parameter]['momentum_buffer'] = buffer
