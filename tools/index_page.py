"""What a package index shows of this package: addresses, and the README with links that work there.

It is hatchling's metadata hook, see `[tool.hatch.metadata.hooks.custom]` in pyproject.toml, and runs in each build. An
index page has no files beside it, so relative links and pictures of README.md would be dead. With the address of the
repository they become absolute, at the tag of the version. Without an address, links become their text, and a picture
becomes a line that names its file.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ['addresses', 'get_metadata_hook', 'long_description']

# code is matched first, so that nothing in it is taken for a link; a link's text may have code and pictures in it
_CODE = r'(?P<code>^(?P<fence>```|~~~).*?^(?P=fence)|`[^`\n]+`)'
_LINK = r'(?P<bang>!?)\[(?P<text>(?:[^\[\]]|!?\[[^\[\]]*\](?:\([^()]*\))?)*)\]\((?P<target>[^()\s]+)\)'
_IMAGE = r'<img\s[^>]*?src="(?P<src>[^"]+)"[^>]*>'
_PATTERN = re.compile(f'{_CODE}|{_LINK}|{_IMAGE}', re.MULTILINE | re.DOTALL)


def addresses(repository: str, version: str) -> dict[str, str]:
    """Return `[project.urls]`: name -> address, empty without the address of the repository."""
    if not repository:
        return {}
    return {
        'Source': repository,
        'Documentation': f'{repository}/blob/v{version}/README.md',
        'Changelog': f'{repository}/blob/v{version}/CHANGELOG.md',
        'Issues': f'{repository}/issues',
    }


def long_description(readme: str, repository: str, version: str) -> str:
    """Return the README without relative links.

    Args:
        readme: README.md.
        repository: Address of the repository on a forge with GitHub's paths, '' if it has none.
        version: Version of the package. The tag is v and the version.
    """
    return _PATTERN.sub(partial(_replace, repository=repository, version=version), readme)


def _replace(match: re.Match[str], repository: str, version: str) -> str:
    if match['code']:
        return match[0]
    if match['src']:
        is_picture, target, alt = True, match['src'], re.search(r'alt="([^"]*)"', match[0])
        text = alt[1] if alt else 'a picture'
    else:
        is_picture, target = bool(match['bang']), match['target']
        text = match['text'] if is_picture else long_description(match['text'], repository, version)
    if re.match(r'[a-z]+:|//', target):  # https: and mailto:
        return match[0] if is_picture else f'[{text}]({target})'
    if not repository:
        return f'*Picture: {text} ({target} in the source distribution)*' if is_picture else text
    path = f'README.md{target}' if target.startswith('#') else target
    absolute = f'{repository}/{"raw" if is_picture else "blob"}/v{version}/{path}'
    if match['src']:
        return match[0].replace(f'"{target}"', f'"{absolute}"')
    return f'{match["bang"]}[{text}]({absolute})'


def get_metadata_hook() -> Any:
    """Return the class that hatchling calls. Only a build has hatchling."""
    from hatchling.metadata.plugin.interface import MetadataHookInterface

    class IndexPage(MetadataHookInterface):
        def update(self, metadata: dict[str, Any]) -> None:
            repository = self.config['repository'].rstrip('/')
            root = Path(self.root)
            (version,) = re.findall(r"^__version__ = '(.+)'$", (root / 'timm_atac' / '__init__.py').read_text(), re.M)
            readme = (root / 'README.md').read_text(encoding='utf-8')
            text = long_description(readme, repository, version)
            metadata['readme'] = {'content-type': 'text/markdown', 'text': text}
            metadata['urls'] = addresses(repository, version)

    return IndexPage
