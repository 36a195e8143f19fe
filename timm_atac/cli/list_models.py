"""List the models that this package registers.

The table has parameters, multiply-adds of one image, tags, and where the weights of each tag are.
"""

import argparse
from fnmatch import fnmatch

from .arguments import CliError
from .table import print_table

__all__ = ['add_arguments', 'run']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'pattern', nargs='?', default='*', help="pattern of names, such as 'atac_resnet*' (default: all)"
    )


def run(args: argparse.Namespace) -> None:
    import timm
    from timm.models import get_arch_pretrained_cfgs

    from .._register import MODULES
    from ..hub.profile import profile
    from ..utils.words import counted, did_you_mean
    from ..weights.published import packaged_file

    rows = [('model', 'params', 'MACs', 'tags', 'weights')]
    names = timm.list_models(module=list(MODULES))
    for name in names:
        cfgs = get_arch_pretrained_cfgs(name)
        if not any(fnmatch(text, args.pattern) for text in (name, *cfgs)):
            continue
        stats = profile(timm.create_model(name, device='meta'))
        cells = (name, f'{stats.params:.2f} M', f'{stats.gmacs:.3f} G')
        for full_name, cfg in cfgs.items():
            weights = f'hf-hub:{cfg.hf_hub_id}' if cfg.hf_hub_id else str(cfg.url or 'none')
            weights = 'in this package' if packaged_file(full_name) else weights
            rows.append((*cells, full_name.partition('.')[2], weights))
            cells = ('', '', '')  # once for each model
    if len(rows) == 1:
        wider = f'*{args.pattern.strip("*")}*'
        hint = did_you_mean(args.pattern, names)
        if found := sum(fnmatch(name, wider) for name in names):
            hint = f'{wider!r} (in quotes) matches {counted(found, "model")}.'
        raise CliError(f'no model of timm_atac matches {args.pattern!r}; {hint or "`timm-atac list` shows all."}')
    print_table(rows)
