"""The checks of the Hub on the metadata of a model card."""

import re
from collections.abc import Iterable
from typing import Any

import yaml  # type: ignore[import-untyped]

from timm_atac.hub.licenses import LICENSES

RESULT = {'task': {'type': str}, 'dataset': {'type': str, 'name': str}, 'metrics': [{'type': str, 'value': object}]}
CARD = {  # the types of these keys in the metadata of a README.md; each key is optional
    'model-index': [{'name': str, 'results': [RESULT]}],
    'tags': [str],
    'library_name': str,
    'license_name': str,
    'license_link': str,
    'pipeline_tag': str,
}
ARTICLES = {str: 'a string', list: 'an array', dict: 'of type object'}


def card_metadata(card: str) -> Any:
    """Return the metadata between the `---` lines of a README.md, None if there is none. Raises PyYAML's errors."""
    found = re.match(r'\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$', card, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(found[1]) if found else None


def card_errors(card: str) -> list[str]:
    try:
        metadata = card_metadata(card)
    except yaml.YAMLError as error:
        return [f'bad yaml: {error}']
    if metadata is None:
        return []
    if not isinstance(metadata, dict):
        return ['"metadata" must be of type object']
    errors = [error for key in CARD if key in metadata for error in mismatches(metadata[key], CARD[key], key)]
    licenses = metadata.get('license', [])
    licenses = licenses if isinstance(licenses, list) else [licenses]
    if not all(isinstance(name, str) and name in LICENSES for name in licenses):
        errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    if 'other' in licenses and 'license_name' not in metadata:
        errors.append('"license_name" is required')
    return errors


def mismatches(value: Any, schema: Any, at: str) -> Iterable[str]:
    """Return where a value does not fit a schema: a type, a list of one schema, or a dictionary of required keys."""
    kind: Any = schema if isinstance(schema, type) else type(schema)
    if value is None:
        yield f'"{at}" is required'
    elif not isinstance(value, kind):
        yield f'"{at}" must be {ARTICLES[kind]}'
    elif kind is list:
        for i, item in enumerate(value):
            yield from mismatches(item, schema[0], f'{at}[{i}]')
    elif kind is dict:
        for key in schema:
            yield from mismatches(value.get(key), schema[key], f'{at}.{key}')
