"""The place of an activation in its network: inside a residual branch, after an addition, inside an attention module.

This is decided from the data flow of a forward pass, and not from names. docs/any_model.md has the rules.
"""

from collections.abc import Iterator
from functools import cached_property

from .flow import Node
from .trace import Call, Invocation, Trace

__all__ = ['Placement']


class Placement:
    """Decides where the activations of an observed forward pass are.

    Args:
        trace: The forward pass.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._nodes = trace.flow.nodes

    def reason_to_leave(self, call: Call) -> str | None:
        """Return why the paper's placement leaves an activation alone, None if it is an inner one of a block."""
        if call.source is None:
            return 'its input does not depend on the input of the model'
        if self.is_in_attention(call):
            return 'inside an attention module'
        if self.is_after_addition(call):
            return 'after a residual addition'
        if self.blocks and call.step < self.blocks[0].start:
            return 'before the first block'
        return None

    @cached_property
    def blocks(self) -> list[Invocation]:
        """The runs of modules that are residual blocks, in the order in which they start.

        A class of modules is a class of blocks if one of them adds two feature maps in its own code. So the blocks of
        an inverted residual network that have no shortcut are blocks too. The model itself is not a block.
        """
        adding = {id(node.invocation): node.invocation for node in self._nodes if node.is_sum and node.invocation}
        classes = {type(invocation.module) for invocation in adding.values()}
        found = [invocation for invocation in self._trace.invocations if type(invocation.module) in classes]
        return [invocation for invocation in found if invocation is not self._trace.invocations[0]]

    def is_after_addition(self, call: Call) -> bool:
        """True for an activation that the sum of a residual block passes on its way to the next block.

        False for the first activation of a pre-activation block: there, the sum also goes around the activation.
        """
        addition = _sum_before(call.source)
        if addition is None:
            return False
        if _reaches_sum(addition, without=call.node, through_norms=True):
            return False
        if call.node is not None and _reaches_sum(call.node):
            return True
        # Neither the sum nor the result is a shortcut where the next block has a convolution in its shortcut, and
        # after the last block. Then the activation belongs to the block that adds if it runs in this block.
        block = addition.invocation
        return block is not None and block.start < call.step < block.end

    def is_in_attention(self, call: Call) -> bool:
        """True for an activation that helps to compute the gates of a map, or the queries, keys and values of it."""
        return id(call.node) in self._in_attention

    @cached_property
    def _in_attention(self) -> set[int]:
        found: set[int] = set()
        for node in self._nodes:
            if node.combines:
                found.update(self._in_gate(node))
            if node.is_product and node.invocation is not None:
                found.update(self._around_product(node))
        return found

    def _in_gate(self, node: Node) -> Iterator[int]:
        """Yield the activations between a map and a gate of this map that is made from a pooled summary of it."""
        for gated in node.inputs:
            for gate in node.inputs:
                broadcasts = gate.positions == 1 < gated.positions
                if gated.index < gate.index and (node.is_multiplication or broadcasts):
                    yield from self._activations_between(gated, gate)

    def _activations_between(self, gated: Node, gate: Node) -> Iterator[int]:
        before_gate = {id(n) for n in _walk(gate, 'inputs', lambda n: n.index > gated.index)}
        is_pooled = {id(gated): False}  # for the operations on the way from the map
        for node in self._nodes[gated.index + 1 : gate.index + 1]:
            sources = [is_pooled[id(n)] for n in node.inputs if id(n) in is_pooled]
            if sources:
                is_pooled[id(node)] = any(sources) or node.is_pool or node.positions < gated.positions
        if is_pooled.get(id(gate)):
            for node in self._nodes[gated.index + 1 : gate.index + 1]:
                if node.name == 'activation' and id(node) in before_gate and is_pooled.get(id(node)):
                    yield id(node)

    def _around_product(self, product: Node) -> Iterator[int]:
        """Yield the activations before and after a matrix product, in the module that has it, up to an addition."""
        module = product.invocation

        def is_inside(node: Node) -> bool:
            return not node.is_sum and module.start <= node.step < module.end

        for direction in ('inputs', 'users'):
            yield from (id(n) for n in _walk(product, direction, is_inside) if n.name == 'activation')


def _sum_before(node: Node | None) -> Node | None:
    """Return the addition of two maps that made the input of an activation, also before a norm or dropout."""
    while node is not None and not node.is_sum:
        if not (node.keeps_values or (node.is_norm and len(node.inputs) == 1)):
            return None
        (node,) = node.inputs
    return node


def _reaches_sum(start: Node, without: Node | None = None, through_norms: bool = False) -> bool:
    """True if a value becomes a summand of a later addition of two maps, unchanged or at most normalised."""

    def is_passed(node: Node) -> bool:
        return node is not without and (node.keeps_values or (through_norms and node.is_norm))

    passed = [start, *_walk(start, 'users', is_passed)]
    return any(user.is_sum for node in passed for user in node.users)


def _walk(start: Node, direction: str, condition) -> Iterator[Node]:
    """Yield the nodes that are reached from a node over nodes that fulfil a condition."""
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        for node in getattr(waiting.pop(), direction):
            if id(node) not in seen and condition(node):
                seen.add(id(node))
                waiting.append(node)
                yield node
