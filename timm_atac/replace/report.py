"""The report of `replace_activations`: what is replaced, and what that costs."""

import html
from dataclasses import dataclass, field
from typing import Any

from ..utils.words import counted, shortened
from .imitation import Start

__all__ = ['Replaced', 'Report']

_HEAD = ('unit', 'was', 'channels', 'layout', 'places', 'parameters', 'GMACs')


@dataclass(frozen=True)
class Replaced:
    """A unit in the place of an activation."""

    name: str
    was: str  # type of the activation, or the function with '()'
    channels: int
    input_fmt: str
    places: int  # calls in one forward pass; several calls share the parameters
    parameters: int = 0  # of the unit
    gmacs: float = 0.0  # billions of multiply-adds of the unit, for one image

    def _cells(self) -> tuple[str, ...]:
        numbers = (f'{self.parameters:,}', f'{self.gmacs:.4f}')
        return (self.name, self.was, str(self.channels), self.input_fmt, str(self.places), *numbers)


@dataclass(frozen=True)
class Report:
    """What `replace_activations` does to a model, and what that costs.

    Attributes:
        act: Name of the unit.
        replaced: The units.
        left: Chosen activations that stay, each with the reason.
        model_args: Of a timm model that was changed: the arguments of `atac_host` that create it again.
        rd_ratio: Width of the units' bottleneck over the channels, None for the units' default.
        chosen: How `rd_ratio` was chosen, '' if it was given as a number.
        parameters: Parameters of the model before and after.
        gmacs: Billions of multiply-adds for one image of the example input, before and after. Those of convolutions,
            matrix products and linear layers count.
        stages: A line for each stage: its number and its modules.
        not_chosen: For `where='paper'`, a stage or a type: the names of activations that it leaves out, by the reason.
        norms: Types of the norms inside of the units.
        start: How the units start.
        mixes_images: True if these have BatchNorm and the model had none before.
    """

    act: str
    replaced: tuple[Replaced, ...]
    left: tuple[tuple[str, str], ...]
    model_args: dict[str, Any] | None = field(default=None, compare=False)
    rd_ratio: float | None = None
    chosen: str = ''
    parameters: tuple[int, int] = (0, 0)
    gmacs: tuple[float, float] = (0.0, 0.0)
    stages: tuple[str, ...] = ()
    not_chosen: tuple[tuple[str, tuple[str, ...]], ...] = ()
    norms: tuple[str, ...] = ()
    mixes_images: bool = False
    start: Start = field(default_factory=Start)

    def __str__(self) -> str:
        rows = [_HEAD, *(r._cells() for r in self.replaced)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligns = ['<' if name in ('unit', 'was', 'layout') else '>' for name in _HEAD]
        aligned = (
            '  '.join(f'{cell:{align}{width}}' for cell, align, width in zip(row, aligns, widths, strict=True))
            for row in rows
        )
        return '\n'.join([self._title(), *(f'  {line.rstrip()}' for line in aligned), *self._notes()])

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        cells = [f'<td>{"</td><td>".join(map(html.escape, r._cells()))}</td>' for r in self.replaced]
        body = ''.join(f'<tr>{row}</tr>' for row in cells)
        notes = ''.join(f'<p>{html.escape(line.strip())}</p>' for line in self._notes())
        return (
            f'<p>{html.escape(self._title())}</p><table><thead><tr><th>{"</th><th>".join(_HEAD)}</th></tr></thead>'
            f'<tbody>{body}</tbody></table>{notes}'
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the text in IPython where it cannot show a table."""
        printer.text(str(self))

    def caveats(self) -> str:
        """Return what may surprise, or '': shared units, BatchNorm in a model without it, activations that stay."""
        shared = [r.name for r in self.replaced if r.places > 1]
        lines = [f'  one unit each for several places: {", ".join(shared)}'] if shared else []
        return '\n'.join([*lines, *self._mixing(), *self._warning_of_start(), *self._stays()])

    def _title(self) -> str:
        return f'{counted(len(self.replaced), "unit")} ({self.act})'

    def _notes(self) -> list[str]:
        (before, after), (macs, macs_after) = self.parameters, self.gmacs
        share, macs_share = after / before - 1 if before else 0, macs_after / macs - 1 if macs else 0
        lines = [
            f'  parameters: {before:,} before, {after:,} after ({share:+.1%})',
            f'  GMACs: {macs:.3f} before, {macs_after:.3f} after ({macs_share:+.1%})',
        ]
        if self.chosen:
            lines.append(f'  {self.chosen}')
        if self.norms and not self.mixes_images:
            lines.append(f'  norm of the units: {", ".join(self.norms)}')
        if self.stages:
            lines.append(f'  stages: {"; ".join(self.stages)}')
        lines += [f'  not chosen, {reason}: {", ".join(shortened(names, 4))}' for reason, names in self.not_chosen]
        return [*lines, *self._mixing(), *self._starting(), *self._warning_of_start(), *self._stays()]

    def _mixing(self) -> list[str]:
        if not self.mixes_images:
            return []
        return [
            f'  norm of the units: {", ".join(self.norms)}, and the model has no BatchNorm. In training, the output '
            f"for an image then depends on the other images of the batch. act='atac_layernorm2d' does not mix images"
        ]

    def _starting(self) -> list[str]:
        units, imitating, channels, following = self.start[1:]
        if not imitating:
            return []
        which = 'all units start' if imitating == units else f'{imitating} of {units} units start'
        return [
            f'  start: {which} close to the activations that they replace, with {following} of {channels} gates that '
            f'follow the sign of their channel{"" if following == channels else " (rd_ratio=1: all)"}'
        ]

    def _warning_of_start(self) -> list[str]:
        if not self.start.is_trained:
            return []
        return ['  the model is trained: fine-tune it, or train it again. Until then, its accuracy is lower or lost']

    def _stays(self) -> list[str]:
        return [f'  {name} stays: {reason}' for name, reason in self.left]
