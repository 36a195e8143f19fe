"""What each command of `timm-atac` does with its arguments: one call, and a few lines about the result."""

import argparse
import ast
import re
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

__all__ = ['CliError', 'card', 'convert', 'gates', 'list_models', 'push']

# Nothing heavy is imported before a command runs: a help text takes no seconds.


class CliError(Exception):
    """A command that was not carried out: why, and what to do."""


def convert(args: argparse.Namespace) -> None:
    if args.source.is_dir():
        if args.model or args.tag or args.model_kwargs or args.image:
            raise CliError(
                '--model, --tag, --model-kwargs and --image are for a .params file; a folder has a config.json.'
            )
        if args.target.suffix != '.params':
            raise CliError(f'{args.target}: expected FILE.params, since {args.source} is a folder.')
        from ..hub.convert_params import convert_folder

        convert_folder(args.source, args.target)
        print(f'Wrote {args.target}')
        return
    if not args.model:
        raise CliError('--model is needed for a .params file: ARCH or ARCH.TAG, as `timm-atac list` shows them.')
    architecture, _, tag = args.model.partition('.')
    if tag and args.tag and tag != args.tag:
        raise CliError(f'--model {args.model} and --tag {args.tag} name two tags; give one.')
    tag = tag or args.tag
    if tag and not re.fullmatch(r'\w[\w.-]*', tag):
        raise CliError(f'the tag {tag!r} is not part of a name: expected letters, digits, _, - and dots.')
    from ..hub.convert_params import convert_params

    convert_params(
        args.source,
        args.target,
        f'{architecture}.{tag}' if tag else architecture,
        _model_kwargs(args.model_kwargs),
        _open(args.image),
        log=_log,
    )
    print(f'Wrote {args.target}: {", ".join(sorted(path.name for path in args.target.iterdir()))}')


def push(args: argparse.Namespace) -> None:
    from ..hub import push as hub
    from ..weights.folder import read_config

    if args.model:
        name = _check_published(args.model)
    else:
        from ..hub.card import name_of

        name = name_of(read_config(args.folder))
    repo = hub.resolve_repo(args.repo, name)  # before there is a download
    if not args.dry_run:
        hub.check_token()
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or _published(args.model, Path(made, 'folder'))
        _log(f'Checking {folder}')
        package = hub.check(folder, repo)
        print(f'{package.name} -> {package.repo}{" (private, if it is new)" if args.private else ""}')
        for file, size in package.files.items():
            print(f'  {file:18} {size / 1e3:10,.1f} kB')
        print(f'  {package.license_note or f"licence: {package.license}"}')
        if args.dry_run:
            print('Nothing was pushed (--dry-run).')
            return
        if package.license_note and not args.yes:
            _ask(package.repo)
        _log(f'Pushing to {package.repo}')
        pushed = hub.push(package, args.private)
        print(f'{"Pushed to" if pushed.changed else "Nothing has changed in"} {pushed.url}')


def _check_published(name: str) -> str:
    from ..weights.published import PUBLISHED

    if name not in PUBLISHED:
        raise CliError(
            f'{name!r} has no published weights; {", ".join(PUBLISHED)} has. For others: convert, then push.'
        )
    return name


def _published(name: str, folder: Path) -> Path:
    """Download and convert the weights of a tag, from where they come from and not from the Hub."""
    from ..hub.convert_params import create
    from ..hub.export import export
    from ..weights.published import PUBLISHED

    _log(f'Loading {PUBLISHED[name].url}')
    export(create(name, pretrained=True, pretrained_cfg_overlay={'hf_hub_id': ''}), folder, log=_log)
    return folder


def _ask(repo: str) -> None:
    if not sys.stdin.isatty():
        raise CliError(f'{repo}: the weights have no licence; say --yes to upload them all the same.')
    if input(f'Upload weights that have no licence to {repo} all the same? [y/N] ').strip().lower() not in ('y', 'yes'):
        raise CliError('Nothing was pushed.')


def card(args: argparse.Namespace) -> None:
    from ..hub.card import REPO, render
    from ..hub.export import PICTURE, write_card
    from ..hub.facts import config_folder, read_facts
    from ..weights.folder import read_config

    folder = Path(args.target)
    if not folder.is_dir():
        tag_folder = config_folder(args.target)
        if tag_folder is None:
            raise CliError(f'{args.target!r} is neither a folder nor a tag with a card of its own.')
        if args.image:
            raise CliError('--image is for a folder, which has the weights.')
        _log(f'{REPO} and {PICTURE} are filled in when it is exported and pushed.')
        print(render(read_config(tag_folder), read_facts(args.facts or tag_folder / 'card.yaml'), PICTURE), end='')
        return
    written = write_card(folder, read_facts(args.facts) if args.facts else None, _open(args.image), log=_log)
    print(f'Wrote {folder}: {", ".join(written)}')


def gates(args: argparse.Namespace) -> None:
    if args.output.suffix.lower() != '.png' or args.output.is_dir():
        raise CliError(f'-o {args.output}: expected the name of a PNG file.')
    names = _labels(args.model, args.checkpoint)
    from ..gates.pictures import compare_picture, gates_picture

    image = _open(args.image)
    models = _create(names, args)
    note = 'random weights' if args.untrained else None
    if len(models) > 1:
        _print_comparison(compare_picture(models, image, args.output, title=note))
    else:
        ((label, model),) = models.items()
        gates = gates_picture(model, image, args.output, title=f'{label}, {note}' if note else label)
        width = max(map(len, gates))
        print(f'{"unit":{width}}  {"gates":>14}  mean   std')
        for name, gate in gates.items():
            print(f'{name:{width}}  {_statistics(gate)}')
    print(f'Wrote {args.output}')


def _labels(names: Sequence[str], checkpoints: Sequence[Path]) -> dict[str, str]:
    """What each model is called in the picture, and its name.

    Several are called without the path of a folder, unless two are the same then; with their checkpoints, where one is
    there several times.
    """
    if checkpoints and len(checkpoints) != len(names):
        raise CliError(
            f'--checkpoint has {len(checkpoints)} files for {len(names)} models: expected one for each, in that order.'
        )
    labels = [_short(name) if len(names) > 1 else name for name in names]
    labels = labels if len(set(labels)) == len(set(names)) else list(names)
    if checkpoints:
        labels = [
            f'{label} {path}' if names.count(name) > 1 else label
            for label, name, path in zip(labels, names, checkpoints, strict=True)
        ]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise CliError(f'--model has {twice} twice: expected different models, or --checkpoint with different files.')
    return dict(zip(labels, names, strict=True))


def _short(name: str) -> str:
    return Path(name.removeprefix('local-dir:')).name if name.startswith('local-dir:') else name


def _print_comparison(gates: dict[str, dict[str, Any]]) -> None:
    rows = [('place', 'model', 'gate', f'{"gates":>14}  mean   std')]
    for row in zip(*(column.items() for column in gates.values()), strict=True):
        for label, (name, gate) in zip(gates, row, strict=True):
            place, _, own = name.rpartition('.')
            rows.append((place or own, label, own, _statistics(gate)))
    _print_table(rows)


def _statistics(gate: Any) -> str:
    return f'{"x".join(map(str, gate.shape[1:])):>14}  {gate.mean():.3f}  {gate.std():.3f}'


def _create(names: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """The networks to draw, with their weights, by label."""
    from ..hub.convert_params import create

    for name in names.values():
        if Path(name).is_dir():
            raise CliError(f'{name} is a folder: say --model local-dir:{name}')
    for path in args.checkpoint:
        if not path.is_file():
            raise CliError(f'{path} is not a file.')
    pretrained = not args.untrained and not args.checkpoint
    kwargs = _model_kwargs(args.model_kwargs)
    _check_models(names, kwargs)
    try:
        models = {label: create(name, pretrained=pretrained, **kwargs) for label, name in names.items()}
    except ValueError as error:
        hint = ' For weights from elsewhere: --checkpoint FILE; for random ones: --untrained.' if pretrained else ''
        raise CliError(f'{str(error).rstrip(".")}.{hint}') from error
    for model, path in zip(models.values(), args.checkpoint, strict=False):  # no files, or as many
        _load_checkpoint(model, path)
    return models


def _check_models(names: dict[str, str], kwargs: dict[str, Any]) -> None:
    """Whether there can be a picture, before there is a download."""
    from timm.models import is_model

    from ..gates.pictures import check_comparable, gated_units
    from ..hub.convert_params import create

    known = {label: name for label, name in names.items() if ':' not in name}
    for name in known.values():
        if not is_model(name.partition('.')[0]):
            raise CliError(f'timm knows no model {name!r}; see `timm-atac list`.')
    if len(known) < len(names):
        return  # what a folder or the Hub has, shows when it is loaded
    models = {label: create(name, device='meta', **kwargs) for label, name in known.items()}
    if len(models) > 1:
        check_comparable(models)
        return
    ((name, model),) = models.items()
    if not gated_units(model):
        raise CliError(
            f'{name} has no unit with a gate; timm gives its models some by --model-kwargs act_layer=atac. Two models '
            f'and more are drawn side by side with whatever gates they have.'
        )


def _load_checkpoint(model: Any, path: Path) -> None:
    """Weights in a format of timm's or of the authors'; nothing in them is run."""
    from timm.models import load_checkpoint
    from torch.serialization import safe_globals

    from ..weights.convert import to_state_dict
    from ..weights.params import is_params, read_params

    if is_params(path):
        model.load_state_dict(to_state_dict(read_params(path), model))
        return
    try:
        with safe_globals([argparse.Namespace]):  # train.py's arguments
            load_checkpoint(model, str(path), weights_only=True)
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CliError(f'{path} does not load into {type(model).__name__}: {line}') from error


def list_models(args: argparse.Namespace) -> None:
    import timm

    from .._register import MODULES
    from ..hub.profile import profile

    rows = [('model', 'params', 'MACs', 'tags', 'weights')]
    for name in timm.list_models(module=list(MODULES)):
        if not any(fnmatch(text, args.pattern) for text in (name, *(f'{name}.{tag}' for tag, _ in _tags(name)))):
            continue
        stats = profile(timm.create_model(name, device='meta'))
        for tag, weights in _tags(name):
            first = not rows[-1][0] or rows[-1][0] != name
            cells = (name, f'{stats.params:.2f} M', f'{stats.gmacs:.3f} G') if first else ('', '', '')
            rows.append((*cells, tag, weights))
    if len(rows) == 1:
        raise CliError(f'no model matches {args.pattern!r}.')
    _print_table(rows)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        print('  '.join([f'{cell:{width}}' for cell, width in zip(row, widths, strict=False)] + [row[-1]]).rstrip())


def _tags(name: str) -> list[tuple[str, str]]:
    """Tags of a model, and where each has its weights."""
    from timm.models import get_arch_pretrained_cfgs

    cfgs = get_arch_pretrained_cfgs(name).items()
    return [
        (full.partition('.')[2], f'hf-hub:{cfg.hf_hub_id}' if cfg.hf_hub_id else str(cfg.url or 'none'))
        for full, cfg in cfgs
    ]


def _model_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` as timm's scripts read them: a Python literal, or else text."""
    if not pairs:
        return {}
    from ..weights.folder import RESERVED

    kwargs: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition('=')
        if not equals or not key.isidentifier():
            raise CliError(f'--model-kwargs {pair!r}: expected KEY=VALUE.')
        if key in RESERVED or key in ('device', 'dtype'):
            raise CliError(f'--model-kwargs {pair!r}: {key} is not an argument of the network itself.')
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return kwargs


def _open(path: Path | None) -> Any:
    from PIL import Image, UnidentifiedImageError

    if path is None:
        return None
    try:
        with Image.open(path) as file:
            file.load()
            return file
    except UnidentifiedImageError:
        raise CliError(f'Pillow cannot read {path} as an image.') from None


def _log(line: str) -> None:
    print(line, file=sys.stderr)
