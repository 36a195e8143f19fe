"""The data flow of one forward pass: which operation made each feature map, and from which maps."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

__all__ = ['Flow', 'Node']

_ADD = re.compile(r'^(__i?r?add__|add_?|addcmul_?)$')
_MULTIPLY = re.compile(r'^(__i?r?mul__|mul_?|multiply_?)$')
_NORM = re.compile(r'norm')
_POOL = re.compile(r'pool|^(mean|sum|amax|amin|std|var|logsumexp)$')
_PRODUCT = re.compile(
    r'^(matmul|__r?matmul__|mm|bmm|baddbmm|einsum|scaled_dot_product_attention|multi_head_attention_forward)$'
)
_SCALE = re.compile(r'^(__i?r?(add|mul|sub|truediv)__|(add|mul|sub|div)_?|multiply_?|divide_?)$')
_COPY = re.compile(r'dropout|^(contiguous|to|type|type_as|clone|detach|float|half|bfloat16|double)$')
_RESHAPE = re.compile(
    r'view|reshape|permute|transpose|flatten|squeeze|swap|movedim|moveaxis|roll|^(pad|__getitem__|__get__|narrow|expand|'
    r'expand_as)$'
)


@dataclass(eq=False)
class Node:
    """An operation that depends on the input of the model."""

    name: str  # of the function, 'input', or 'activation'
    inputs: tuple['Node', ...]
    positions: int  # values per image and channel of the output: height x width of a map, or number of tokens
    shape: tuple[int, ...]  # of the output
    step: int  # its time in the forward pass, as in `trace.Call`
    index: int  # operations that depend on each other are in this order
    invocation: Any  # the `trace.Invocation` whose own code runs the operation
    users: list['Node'] = field(default_factory=list)

    @property
    def is_sum(self) -> bool:
        """True for an addition of two feature maps of one shape."""
        return _ADD.match(self.name) is not None and sum(node.shape == self.shape for node in self.inputs) > 1

    @property
    def is_product(self) -> bool:
        """True for a matrix product of two feature maps, as in self-attention."""
        return _PRODUCT.match(self.name) is not None and len(self.inputs) > 1

    @property
    def combines(self) -> bool:
        """True for an elementwise product or sum of two feature maps."""
        return len(self.inputs) > 1 and (_MULTIPLY.match(self.name) or _ADD.match(self.name)) is not None

    @property
    def is_multiplication(self) -> bool:
        return _MULTIPLY.match(self.name) is not None

    @property
    def is_norm(self) -> bool:
        return _NORM.search(self.name) is not None

    @property
    def is_pool(self) -> bool:
        return _POOL.search(self.name) is not None

    @property
    def is_copy(self) -> bool:
        """True if the output has the values of the input at the same places: dropout in evaluation, another type."""
        return len(self.inputs) == 1 and _COPY.search(self.name) is not None

    @property
    def keeps_values(self) -> bool:
        """True for reshaping, dropout, and scaling by something that does not depend on the input of the model."""
        if len(self.inputs) != 1 or self.name == 'activation':
            return False
        return (_COPY.search(self.name) or _RESHAPE.search(self.name) or _SCALE.match(self.name)) is not None


class Flow:
    """Records the operations of a forward pass. A tensor has the operation that made it as `_timm_atac_node`."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._inputs: dict[int, tuple[torch.Tensor, Node]] = {}  # by id, so that the user's tensors stay as they are

    def add_inputs(self, values: Any) -> None:
        """Record the arguments of the model."""
        for tensor in _tensors(values):
            self._inputs[id(tensor)] = (tensor, self._append('input', (), tensor, 0, None))

    def add_function(
        self, function: Callable, args: tuple, kwargs: Mapping[str, Any], output: Any, step: int, invocation: Any
    ) -> None:
        """Record a function of PyTorch, unless its arguments do not depend on the input of the model."""
        name = getattr(function, '__name__', '')
        outputs = [args[0]] if name == '__setitem__' else _tensors(output)
        inputs = [*self._nodes_of((args, kwargs))] if outputs else []
        if not inputs or (name == '__get__' and not isinstance(output, torch.Tensor)):
            return
        node = self._append(name, tuple(dict.fromkeys(inputs)), outputs[0], step, invocation)
        for tensor in outputs:
            tensor._timm_atac_node = node

    def add_activation(self, source: Node | None, output: torch.Tensor, step: int, invocation: Any) -> Node | None:
        """Record that an activation has made `output` from what `source` has made."""
        if source is None:
            return None
        output._timm_atac_node = node = self._append('activation', (source,), output, step, invocation)  # type: ignore[attr-defined]
        return node

    def connect(self, args: Any, output: Any, step: int, invocation: Any) -> None:
        """Record the outputs of a module that no recorded function has made: those of an autograd function."""
        outputs = [t for t in _tensors(output) if self.node_of(t) is None]
        inputs = [*self._nodes_of(args)] if outputs else []
        if inputs:
            node = self._append('', tuple(dict.fromkeys(inputs)), outputs[0], step, invocation)
            for tensor in outputs:
                tensor._timm_atac_node = node

    def node_of(self, tensor: Any) -> Node | None:
        """Return the operation that made a tensor, None if it does not depend on the input of the model."""
        node = getattr(tensor, '_timm_atac_node', None)
        return self._inputs[id(tensor)][1] if node is None and id(tensor) in self._inputs else node

    def _nodes_of(self, values: Any) -> Iterator[Node]:
        for tensor in _tensors(values):
            node = self.node_of(tensor)
            if node is not None:
                yield node

    def _append(self, name: str, inputs: tuple[Node, ...], output: torch.Tensor, step: int, invocation: Any) -> Node:
        shape = tuple(output.shape)
        node = Node(name, inputs, _positions(output), shape, step, len(self.nodes), invocation)
        self.nodes.append(node)
        for source in inputs:
            source.users.append(node)
        return node


def _positions(x: torch.Tensor) -> int:
    """Return the values of a tensor per image and channel. In 4 dimensions, channels are first if it is unknown."""
    if x.ndim < 3:
        return 1
    dim = getattr(x, '_timm_atac_dim', None)
    if dim is None or dim >= x.ndim:
        dim = 1 if x.ndim == 4 else x.ndim - 1
    return prod(size for d, size in enumerate(x.shape) if d not in (0, dim))


def _tensors(values: Any) -> list[Any]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
