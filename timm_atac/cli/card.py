"""Write the model card of a folder, or print the card of a tag.

The command writes README.md from the folder's config.json and the facts in its card.yaml, gates.png if it does not
exist or --image is given, training.png if the facts have a curve, and card.yaml. README.md is replaced: keep your own
text in the facts.

    timm-atac card OUT_DIR --facts card.yaml
    timm-atac card atac_resnet50.open_atac_in1k

The facts are description, name, base_model, license, license_name, license_link, license_note, origin, datasets,
papers, results, hyperparameters, curve, comparison, citations, picture_credit; hub_configs/ in the package or its
repository has an example. The command adds the fact weights, a hash of the tensors that the facts describe, and
refuses facts of other weights.
"""

import argparse
import logging
from pathlib import Path

from .arguments import IMAGE_HELP, CliError, check_file, open_image

__all__ = ['add_arguments', 'run']


_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('target', metavar='OUT_DIR|ARCH.TAG', help='a folder, or a tag that has a card')
    help = 'file with the facts, copied to card.yaml (default: the facts of the folder or of its tag)'
    parser.add_argument('--facts', type=Path, metavar='YAML', help=help)
    parser.add_argument('--image', type=Path, metavar='IMAGE', help=IMAGE_HELP)


def run(args: argparse.Namespace) -> None:
    if args.facts:
        check_file(args.facts, '--facts', 'a YAML file with the facts of the card')
    from ..hub.card import REPO, render
    from ..hub.curve import CURVE
    from ..hub.export import ASKED, FACTS, PICTURE, write_card
    from ..hub.facts import config_folder, config_names, read_facts
    from ..utils.words import did_you_mean
    from ..weights.folder import read_config

    folder = Path(args.target)
    if folder.is_dir():
        facts = read_facts(args.facts) if args.facts else None
        print(f'Wrote {folder}: {", ".join(write_card(folder, facts, open_image(args.image)))}')
        known = read_facts(folder / FACTS)
        if missing := [name for name in ASKED if name not in known]:
            print(f'Not known of these weights: {", ".join(missing)}. Add them to {folder / FACTS} and run this again.')
        return
    tag_folder = config_folder(args.target)
    if tag_folder is None:
        names = config_names()
        hint = did_you_mean(args.target, names) or f'{" and ".join(names) or "no tag"} has one.'
        raise CliError(f'{args.target!r} is neither a folder nor a tag that has a card; {hint}')
    if args.image:
        raise CliError('--image is for a folder, which has the weights.')
    _logger.info('%s and %s are filled in when the weights are exported and pushed.', REPO, PICTURE)
    facts = read_facts(args.facts or tag_folder / FACTS)
    print(render(read_config(tag_folder), facts, PICTURE, CURVE if facts.get('curve') else None), end='')
