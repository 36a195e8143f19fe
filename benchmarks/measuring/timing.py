"""Measurements that the benchmarks share: interleaved times, peak memory, and bytes kept for the backward pass."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # PyTorch's profiler tells of GPUs that are not there
os.environ.setdefault('TORCHINDUCTOR_FORCE_DISABLE_CACHES', '1')  # what is compiled is what is there now

import torch
import torch.nn as nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from timm_atac.kernels.switch import can_run

__all__ = ['Spread', 'bytes_kept', 'captured', 'device_name', 'interleaved', 'peak_memory', 'ratio', 'runs_kernels']


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
    """Seconds a call of each, one after the other in every round, after two calls that do not count.

    Args:
        runs: What is called, by name.
        rounds: Samples of each.
        device: It is waited for before and after a sample.
        at_least: Seconds a sample should take; a short call is repeated within it.
    """
    repeats = {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, round(at_least / max(_seconds(run, 1, device), 1e-9)))
    return _transposed(
        [{name: _seconds(run, repeats[name], device) for name, run in runs.items()} for _ in range(rounds)]
    )


def captured(run: Callable[[], object], device: torch.device, pool: Any = None) -> Callable[[], object]:
    """A call as a CUDA graph, so that what is measured is the GPU and not Python; on other devices the call itself.

    Args:
        run: What is called.
        device: Where.
        pool: Of `torch.cuda.graph_pool_handle()`, for graphs that may write over each other's results.
    """
    if device.type != 'cuda':
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and allocates what stays
            run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        run()
    return graph.replay


def ratio(times: Mapping[Any, list[float]], name: Any, base: Any) -> Spread:
    """Of the times of two within each round."""
    return Spread.of([mine / other for mine, other in zip(times[name], times[base], strict=True)])


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call allocates at most, over what there was before."""
    run()  # what is allocated once
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
    """Bytes that a forward pass keeps for the backward pass, other than the module's own: exact, on any device."""
    kept: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        output = forward()
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del output
    return sum(size for pointer, size in storages.items() if pointer not in own)


def device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'CPU, {torch.get_num_threads()} threads'


def runs_kernels(device: torch.device) -> bool:
    """Whether there is such a device, and our Triton kernels run on it."""
    return (device.type != 'cuda' or torch.cuda.is_available()) and can_run(device)


def _seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _transposed(rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [times[name] for times in rounds] for name in rounds[0]}
