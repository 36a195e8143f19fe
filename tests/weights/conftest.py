from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import serve


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A folder and the address that serves it."""
    folder = tmp_path_factory.mktemp('site')
    with serve(folder) as address:
        yield folder, address
