"""The operations around the kernels, without running a kernel: their registration, and when they run."""

import copy
from typing import Any

import pytest
import timm
import torch
from atac_me import pair
from fused_models import images, with_random_norms
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import timm_atac
from timm_atac import fuse
from timm_atac.inference import fuse as fused
from timm_atac.inference.fuse import FusedATAC
from timm_atac.kernels import atac, norm_gate, switch

CUDA, CPU = torch.device('cuda'), torch.device('cpu')
LAYOUTS = [torch.channels_last, torch.contiguous_format]
needs_triton = pytest.mark.skipif(not switch.IS_INSTALLED, reason='needs PyTorch 2.7 or newer with Triton')


pytestmark = pytest.mark.usefixtures('kernels_as_before')


@pytest.fixture
def on_the_cpu(monkeypatch) -> None:
    """Fused units call the operation on a CPU, where it computes the formula."""
    monkeypatch.setattr(fused, 'can_run', lambda device: True)
    monkeypatch.setattr(switch, 'IS_INSTALLED', True)


def arguments(dtype: torch.dtype = torch.float32, memory_format: Any = torch.channels_last) -> list[torch.Tensor]:
    """Arguments of `atac`."""
    shapes = [(6, 14), (6,), (14, 6), (14,)]
    x = torch.randn(3, 14, 7, 5, dtype=dtype).contiguous(memory_format=memory_format)
    return [x, *(torch.randn(shape, dtype=dtype) for shape in shapes)]


def calls(count: int, memory_format: Any = torch.channels_last) -> list[torch.Tensor]:
    """Maps and rows for the other operations."""
    maps = [torch.randn(3, 14, 7, 5).contiguous(memory_format=memory_format) for _ in range(count)]
    return [*maps, *(torch.rand(14) + 0.5 for _ in range(4))]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor:UserWarning')
@pytest.mark.parametrize('memory_format', LAYOUTS)
def test_registration(memory_format) -> None:
    """Schemas, fakes and gradients pass PyTorch's own check, which reads .grad of its own views."""
    args = tuple(t.requires_grad_() for t in arguments(memory_format=memory_format))
    torch.library.opcheck(atac.atac, args)
    torch.library.opcheck(norm_gate.norm_gate, tuple(calls(2, memory_format)))
    torch.library.opcheck(norm_gate.norm_gate_sums, tuple(calls(3, memory_format)))
    torch.library.opcheck(norm_gate.norm_gate_backward, (*calls(3, memory_format), torch.randn(2, 14)))


@pytest.mark.slow
def test_gradients() -> None:
    args = [t[:, :, :2, :2].contiguous() if t.ndim == 4 else t for t in arguments(torch.float64)]
    args = [t.requires_grad_() for t in args]
    assert torch.autograd.gradcheck(atac.atac, args)
    assert torch.autograd.gradgradcheck(atac.atac, args)


def test_formulas() -> None:
    x, *weights = args = arguments(torch.float64)
    rows = x.permute(0, 2, 3, 1)
    hidden = (rows @ weights[0].t() + weights[1]).relu()
    expected = rows * (hidden @ weights[2].t() + weights[3]).sigmoid()
    torch.testing.assert_close(atac.atac(*args).permute(0, 2, 3, 1), expected)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(atac.atac(*args).permute(0, 2, 3, 1), expected)
    with_gaps = [args[0][..., ::2], *weights]
    torch.testing.assert_close(atac.atac(*with_gaps), atac.atac(*args)[..., ::2])


@pytest.mark.parametrize('memory_format', LAYOUTS)
def test_formulas_of_training(memory_format) -> None:
    """Result and gradients are those of autograd for a BatchNorm, a sigmoid and a product."""
    grad, x, z, *_, weight, bias = (t.double() for t in calls(3, memory_format))
    norm = torch.nn.BatchNorm2d(14).double()
    norm.weight.data, norm.bias.data = weight, bias
    inputs = [x.clone().requires_grad_(), z.clone().requires_grad_()]
    y = inputs[0] * norm(inputs[1]).sigmoid()
    y.backward(grad)
    rows = [z.mean((0, 2, 3)), (z.var((0, 2, 3), correction=0) + norm.eps).rsqrt(), weight, bias]
    torch.testing.assert_close(norm_gate.norm_gate(x, z, *rows), y.detach())
    sums = norm_gate.norm_gate_sums(grad, x, z, *rows)
    assert norm.bias.grad is not None and norm.weight.grad is not None
    torch.testing.assert_close(sums, torch.stack((norm.bias.grad, norm.weight.grad)).float())
    found = norm_gate.norm_gate_backward(grad, x, z, *rows, sums.double() / (3 * 7 * 5))
    for value, expected in zip(found, inputs, strict=True):
        torch.testing.assert_close(value, expected.grad, rtol=1e-5, atol=1e-6)


def test_gradients_that_are_not_finite() -> None:
    """Where the ReLU is zero, an infinite gradient gives the same as with autograd."""
    args = [t.requires_grad_() for t in arguments(torch.float64)]
    grad = torch.ones(3, 14, 7, 5, dtype=torch.float64)
    grad[0, 0, 0, 0] = torch.inf
    found = torch.autograd.grad(atac.atac(*args), args, grad)
    for value, expected in zip(found, torch.autograd.grad(atac.formula(*args), args, grad), strict=True):
        assert torch.equal(value.isfinite(), expected.isfinite())


def test_only_needed_gradients_are_computed() -> None:
    for index in range(5):
        args = [t.requires_grad_(i == index) for i, t in enumerate(arguments())]
        with FlopCounterMode(display=False) as counter:
            atac.atac(*args).sum().backward()
        assert [t.grad is not None for t in args] == [i == index for i in range(5)]
        assert counter.get_total_flops() <= 6 * 2 * 3 * 7 * 5 * 14 * 6  # products: 2 + 2 again + 2 at most


def test_gradients_under_autocast(on_the_cpu) -> None:
    """The backward pass computes in the types of the forward pass, also where autocast is on."""
    grads = []
    x = torch.randn(3, 14, 7, 5, requires_grad=True)
    unit: Any = fuse(pair()[0], example_input=x.detach(), kernel=True)
    for enabled in (False, True):
        y = unit(x)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*grads)


def test_caches_of_the_compiler_depend_on_the_kernels() -> None:
    library = pytest.importorskip('torch._library.triton')
    find = getattr(library, 'get_triton_kernels_for_op', None)
    if find is None or not switch.IS_INSTALLED:
        pytest.skip('this PyTorch does not look for kernels')
    names = {'atac': 'atac_kernel', 'norm_gate': 'forward_kernel', 'norm_gate_sums': 'sums_kernel'}
    for operation, kernel in (names | {'norm_gate_backward': 'backward_kernel'}).items():
        assert kernel in str([k.__name__ for k in find(f'timm_atac::{operation}')])


def changed(args: list[torch.Tensor], index: int, change: Any) -> list[torch.Tensor]:
    return [change(t) if i == index else t for i, t in enumerate(args)]


@pytest.mark.parametrize(
    'index, change, match',
    [
        (0, lambda x: x[0], r'got shapes \[\(14, 7, 5\), .*Expected an input \(B, C, H, W\), weights \(K, C\)'),
        (1, lambda w: w.t(), r'\(14, 6\), \(6,\), .*Expected an input \(B, C, H, W\), weights \(K, C\)'),
        (2, lambda b: b[1:], r'got shapes .*\(5,\)'),
        (0, lambda x: x.half(), 'input of torch.float16 and parameters of {torch.float32}. Expected'),
        (4, lambda b: b.double(), 'Expected parameters of one floating-point type'),
        (0, lambda x: x.long(), 'input of torch.int64'),
    ],
)
def test_wrong_arguments(index, change, match) -> None:
    args = changed(arguments(), index, change)
    with pytest.raises(ValueError, match=match):
        atac.atac(*args)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=match):
        atac.atac(*args)


def test_wrong_arguments_of_the_others() -> None:
    means = torch.zeros(2, 14)
    operations = {
        norm_gate.norm_gate: (2, ()),
        norm_gate.norm_gate_sums: (3, ()),
        norm_gate.norm_gate_backward: (3, (means,)),
    }
    for operation, (count, more) in operations.items():
        args = calls(count)
        with pytest.raises(ValueError, match=r'values per channel of shapes .*\(13,\)'):
            operation(*changed(args, count, lambda row: row[1:]), *more)
        with pytest.raises(ValueError, match=r'got maps of shapes .*\(3, 14, 6, 5\)'):
            operation(*changed(args, 1, lambda z: z[:, :, 1:]), *more)
        with pytest.raises(ValueError, match='Expected all channels_last, or all contiguous'):
            operation(*changed(args, 1, torch.Tensor.contiguous), *more)


def test_switch(monkeypatch) -> None:
    def wanted(own: bool | None = None, channels: int = 64, device: torch.device = CUDA) -> bool:
        return switch.is_wanted('atac', device, channels, own)

    assert not wanted() and wanted(True) and not wanted(False)
    monkeypatch.setattr(switch, 'IS_INSTALLED', True)
    timm_atac.use_kernels(True)
    assert wanted() and not wanted(False)
    timm_atac.use_kernels(False)
    assert not wanted() and wanted(True)
    timm_atac.use_kernels(None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setitem(switch.MEASURED_TO_WIN, ('atac', (9, 0)), frozenset({64}))
    assert wanted() and not wanted(channels=128) and not wanted(False) and wanted(True, 128) and not wanted(device=CPU)
    assert not switch.is_wanted('norm_gate', CUDA, 64)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 9))
    assert not wanted()
    timm_atac.use_kernels(False)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    assert not wanted()


@pytest.mark.parametrize(
    'capability, version, expected', [((7, 5), None, False), ((8, 0), None, True), ((9, 0), '6', False)]
)
def test_where_it_can_run(monkeypatch, capability, version, expected) -> None:
    monkeypatch.setattr(switch, 'IS_INSTALLED', True)
    monkeypatch.setattr(torch.version, 'hip', version)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert switch.can_run(CUDA) == expected
    monkeypatch.setattr(switch, 'IS_INSTALLED', False)
    assert not switch.can_run(CUDA)


def test_environment(monkeypatch) -> None:
    for value, expected in (('1', True), ('On', True), ('0', False), ('false', False), ('', None)):
        monkeypatch.setenv('TIMM_ATAC_KERNELS', value)
        assert switch._from_environment() is expected
    monkeypatch.setenv('TIMM_ATAC_KERNELS', 'never')
    monkeypatch.setattr(switch, '_choice', switch._from_environment())  # an import must not fail
    assert switch.is_wanted('atac', CUDA, 64, own=True)
    with pytest.raises(ValueError, match=r"TIMM_ATAC_KERNELS='never': expected 1 .*, 0 \(nowhere\), or nothing"):
        switch.is_wanted('atac', CUDA, 64)


def test_without_triton(monkeypatch) -> None:
    monkeypatch.setattr(switch, 'IS_INSTALLED', False)
    with pytest.raises(ImportError, match=r'The kernels need PyTorch 2.7 or newer with Triton, and this is 2\.'):
        timm_atac.use_kernels(True)
    with pytest.raises(ImportError, match='The kernels need PyTorch'):
        fuse(torch.nn.ReLU(), kernel=True)
    timm_atac.use_kernels(False)


@pytest.mark.slow
def test_triton_that_does_not_load(tmp_path, new_python) -> None:
    """The import error is raised when the kernels are enabled."""
    (tmp_path / 'triton').mkdir()
    (tmp_path / 'triton' / '__init__.py').write_text("raise ImportError('no libtriton.so')")
    code = """
import torch, timm_atac
from timm_atac.kernels import atac
try:
    timm_atac.use_kernels(True)
except ImportError as error:
    assert 'installed, but does not load: ImportError: no libtriton.so' in str(error) or '2.7' in str(error), error
else:
    raise AssertionError
arguments = torch.randn(2, 4, 3, 3), torch.randn(2, 4), torch.randn(2), torch.randn(4, 2), torch.randn(4)
assert torch.equal(atac.atac(*arguments), atac.formula(*arguments))
"""
    new_python(code, PYTHONPATH=str(tmp_path), TRITON_INTERPRET='1')


def test_wrong_choices() -> None:
    choices: tuple[Any, ...] = ('no', 1, [])
    for choice in choices:
        with pytest.raises(ValueError, match=r'use_kernels: got .*, expected True .*, False \(nowhere\) or None'):
            timm_atac.use_kernels(choice)
        with pytest.raises(ValueError, match=r'fuse: kernel: got .*, expected True'):
            fuse(torch.nn.ReLU(), kernel=choice)


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_needed(python) -> None:
    """With kernels enabled on a CPU, where they cannot run."""
    code = """
import sys, torch, timm, timm_atac
model = timm_atac.fuse(timm.create_model('atac_resnet8_cifar'), example_input=torch.zeros(2, 3, 32, 32))
model(torch.zeros(2, 3, 32, 32))
timm_atac.ATACMe(14)(torch.zeros(2, 14, 32, 32)).sum().backward()
loaded = {name for name in sys.modules if name.startswith('timm_atac.kernels.')}
assert loaded == {f'timm_atac.kernels.{name}' for name in ('gate', 'linear', 'switch')}, loaded
"""
    python(code, TIMM_ATAC_KERNELS='1')


@needs_triton
def test_printed(monkeypatch) -> None:
    unit = pair()[0]
    x = torch.randn(3, 14, 7, 5)
    model: Any = fuse(unit, example_input=x, kernel=True)
    assert 'two products on cpu' in repr(model)  # it cannot run there
    monkeypatch.setattr(fused, 'can_run', lambda device: True)
    assert 'one kernel on cpu' in repr(model)
    assert 'two products on cpu' in repr(fuse(model, example_input=x, kernel=False))
    undecided = fuse(unit, example_input=x)
    assert 'two products' in repr(undecided)
    monkeypatch.setattr(switch, 'IS_INSTALLED', True)
    timm_atac.use_kernels(True)
    assert 'one kernel' in repr(undecided)
    assert 'two products' in repr(copy.deepcopy(undecided).double())


def test_changed_parts(on_the_cpu) -> None:
    """Layers that replaced others, perhaps without a weight, are called."""
    x = torch.randn(3, 14, 7, 5)
    fused: Any = fuse(pair()[0], example_input=x, kernel=True)
    expected = fused(x)
    fused.conv1 = torch.nn.Sequential(fused.conv1)
    torch.testing.assert_close(fused(x), expected)
    assert 'kernel on' not in repr(fused)


def test_wide_units_are_two_products(monkeypatch, on_the_cpu) -> None:
    monkeypatch.setattr(fused, 'MOST_HIDDEN', 7)
    for channels, form in ((14, 'one kernel'), (16, 'two products')):
        x = torch.randn(2, channels, 3, 3)
        unit: Any = fuse(pair(channels)[0], example_input=x, kernel=True)
        assert form in repr(unit) and unit._fits_kernel(x) == (channels == 14)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor:UserWarning')
@pytest.mark.parametrize('compiled', [False, True])
def test_transforms(on_the_cpu, compiled) -> None:
    """jvp, vmap and grad of torch.func, which use the rules of the operations inside."""
    torch.compiler.reset()
    x, v = torch.randn(2, 3, 14, 7, 5)
    given = pair()[0]
    plain, unit = (fuse(given, example_input=x, kernel=kernel) for kernel in (False, True))

    def both(module: Any) -> Any:
        def run(x: torch.Tensor, v: torch.Tensor) -> Any:
            return torch.func.jvp(module, (x,), (v,)), torch.func.vmap(module)(x[None]), torch.func.grad(total)(x)

        def total(x: torch.Tensor) -> torch.Tensor:
            return module(x).square().sum()

        return torch.compile(run, backend='eager') if compiled else run

    for found, expected in zip(tree_leaves(both(unit)(x, v)), tree_leaves(both(plain)(x, v)), strict=True):
        torch.testing.assert_close(found, expected)
    assert both(unit)(x, v)[0][1].abs().max() > 0


def test_vectorised_jacobian(on_the_cpu) -> None:
    unit = fuse(pair(4)[0], example_input=torch.randn(2, 4, 2, 2), kernel=True)
    x = torch.randn(1, 4, 2, 2)
    found, expected = (torch.autograd.functional.jacobian(unit, x, vectorize=v) for v in (True, False))
    torch.testing.assert_close(found, expected)


def test_fx(on_the_cpu) -> None:
    model, x, expected = model_and_images()
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-5)


def model_and_images() -> tuple[Any, torch.Tensor, torch.Tensor]:
    model = with_random_norms(timm.create_model('atac_resnet8_cifar'), dtype=torch.float32)
    x = images(model)[:2]
    with torch.no_grad():
        return fuse(model, kernel=True), x, model(x)


def count(graph: torch.fx.Graph) -> int:
    return sum('timm_atac.atac' in str(node.target) for node in graph.nodes)


@pytest.mark.slow
def test_compiled(on_the_cpu) -> None:
    """The operations are nodes of one graph. After the switch, there is another graph."""
    model, x, expected = model_and_images()
    units = [m for m in model.modules() if isinstance(m, FusedATAC)]
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        counts.append(count(graph.graph))
        return graph.forward

    for unit in units:
        unit.kernel = None
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for enable in (True, False, True):
            timm_atac.use_kernels(enable)
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert counts == [len(units), 0]


@pytest.mark.slow
def test_exported(on_the_cpu, tmp_path, python) -> None:
    """The operation is one node. To load the program, one must import the operation."""
    model, x, expected = model_and_images()
    program = torch.export.export(model, (x,))
    assert count(program.graph) == sum(isinstance(m, FusedATAC) for m in model.modules())
    torch.export.save(program, tmp_path / 'model.pt2')
    torch.save((x, expected), tmp_path / 'expected.pt')
    code = f"""
import torch, timm_atac.kernels.atac
x, expected = torch.load(r'{tmp_path}/expected.pt')
with torch.no_grad():
    found = torch.export.load(r'{tmp_path}/model.pt2').module()(x)
torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
"""
    python(code)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The TorchScript type system:UserWarning')
def test_other_exports_have_no_kernel(on_the_cpu, run_onnx) -> None:
    model, x, expected = model_and_images()
    torch.testing.assert_close(run_onnx(model, x), expected, rtol=1e-3, atol=1e-4)
    for program in (torch.jit.script(model), torch.jit.trace(model, x, check_tolerance=1e-3)):
        assert 'sigmoid' in str(program.inlined_graph) and 'timm_atac::' not in str(program.inlined_graph)
        with torch.no_grad():
            torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_triton
def test_traced_for_a_gpu(monkeypatch) -> None:
    """The compiler gets one operation with the Triton kernel in it. The tensors are fake, so no GPU is needed."""
    unit: Any = fuse(pair(16)[0], example_input=torch.randn(2, 16, 4, 4), kernel=True)
    monkeypatch.setattr(atac, 'can_run', lambda device: True)
    traced: list[torch.fx.GraphModule] = []
    lowered: list[torch.fx.GraphModule] = []

    def keep(graphs: list[torch.fx.GraphModule]) -> Any:
        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            graphs.append(graph)
            return graph.forward

        return backend

    with FakeTensorMode(), torch.no_grad():
        for conv in (unit.conv1, unit.conv2):
            for name, p in list(conv.named_parameters()):
                setattr(conv, name, torch.nn.Parameter(torch.empty(p.shape, device='cuda')))
        x = torch.empty(2, 16, 4, 4, device='cuda')
        for backend in (keep(traced), aot_autograd(fw_compiler=keep(lowered))):
            y = torch.compile(unit, backend=backend, fullgraph=True)(x)
            assert y.device.type == 'cuda' and y.stride() == x.stride()
    assert count(traced[0].graph) == 1
    assert 'triton_kernel_wrapper' in str(lowered[0].graph) and 'convolution' not in str(lowered[0].graph)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    'dtype, channels_last', [('bfloat16', True), ('float16', False), ('float32', True), ('autocast', True)]
)
def test_compiles_for_gpus(dtype, channels_last) -> None:
    """All kernels compile for GPUs that are not here, without spilled registers and within the shared memory."""
    from kernel_resources import launches

    found = [launches(channels, dtype, channels_last) for channels in (20, 64, 512)]
    assert all(launch.keys() == {'atac_kernel', 'forward_kernel', 'sums_kernel', 'backward_kernel'} for launch in found)
    resources = {}
    for by_name in (found[0], found[2]) if dtype == 'bfloat16' else found[1:2]:
        for name, launch in by_name.items():
            for capability in (80, 90):
                resources[name, capability] = launch.compile(capability)
                assert resources[name, capability].spilled == 0
                assert 0 < resources[name, capability].registers <= 255
                assert resources[name, capability].fits(capability)
    assert resources['atac_kernel', 80].shared > 0
