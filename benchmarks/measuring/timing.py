"""Measure times of functions that take turns, peak memory, and the bytes saved for the backward pass."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # no messages of PyTorch's profiler about missing GPUs
os.environ.setdefault('TORCHINDUCTOR_FORCE_DISABLE_CACHES', '1')  # do not reuse code that an earlier run compiled

import torch
import torch.nn as nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from timm_atac.kernels.switch import can_run

__all__ = [
    'Spread',
    'as_cuda_graph',
    'bytes_kept',
    'can_run_kernels',
    'device_name',
    'interleaved',
    'peak_memory',
    'ratio',
]


class Spread(NamedTuple):
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> 'Spread':
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f'{self.median:.3f} ({self.low:.3f}..{self.high:.3f})'


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Time several functions, which take turns in every round. Two calls of each come first and are not counted.

    Args:
        runs: The functions by name.
        rounds: Number of samples per function.
        device: Device to synchronize with before and after each sample.
        at_least: Seconds per sample. A function that takes less is called repeatedly.

    Returns:
        Seconds per call for each sample, by name.
    """
    repeats = {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, round(at_least / max(_seconds(run, 1, device), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_seconds(run, repeats[name], device))
    return times


def as_cuda_graph(run: Callable[[], object], device: torch.device, pool: Any = None) -> Callable[[], object]:
    """Return a function as a CUDA graph, whose time does not include Python. On other devices, return `run`.

    Args:
        run: The function.
        device: Its device.
        pool: Result of `torch.cuda.graph_pool_handle()`, shared by graphs that may overwrite each other's results.
    """
    if device.type != 'cuda':
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile, and allocate memory that is kept
            run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        run()
    return graph.replay


def ratio(times: Mapping[Any, list[float]], name: Any, base: Any) -> Spread:
    """Return the ratio of two functions' times within each round."""
    return Spread.of([mine / other for mine, other in zip(times[name], times[base], strict=True)])


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the bytes that a call allocates, over those allocated before it."""
    run()  # allocate what is allocated only once
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e for e in results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def bytes_kept(forward: Callable[[], object], module: nn.Module) -> int:
    """Return the bytes that a forward pass saves for the backward pass, without the module's parameters and buffers."""
    kept: list[torch.UntypedStorage] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.untyped_storage())
        # a graph that holds a tensor with that graph is never freed
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        output = forward()
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages = {storage.data_ptr(): storage.nbytes() for storage in kept}
    del output
    return sum(size for pointer, size in storages.items() if pointer not in own)


def device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'CPU, {torch.get_num_threads()} threads'


def can_run_kernels(device: torch.device) -> bool:
    """True if the device exists and our Triton kernels run on it."""
    return (device.type != 'cuda' or torch.cuda.is_available()) and can_run(device)


def _seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
