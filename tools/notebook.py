"""Execute docs/quickstart.ipynb and keep its outputs.

python tools/notebook.py
"""

import base64
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / 'docs' / 'quickstart.ipynb'
ENVIRONMENT = {
    'OMP_NUM_THREADS': '1',  # the same sums on machines with any number of cores
    'PYTHONWARNINGS': 'ignore:IProgress not found',  # of tqdm without ipywidgets, which huggingface_hub imports
}
COLOURS = 256
"""Colours of a picture that is kept. It then has a third of the bytes, and looks the same."""


def executed(path: Path, folder: Path) -> Any:
    """Return the notebook of a file with new outputs. The file stays as it is.

    Args:
        path: A notebook.
        folder: Where it runs, and writes its files.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raises an error.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        resources={'metadata': {'path': str(folder)}},
        timeout=300,
        record_timing=False,
        coalesce_streams=True,  # of a progress bar, only the last state
    )
    client.execute(env={**os.environ, **ENVIRONMENT})
    notebook.metadata.language_info = {'name': 'python'}  # without the version of Python
    for output in (output for cell in notebook.cells for output in cell.get('outputs', [])):
        data = output.get('data', {})
        if 'image/png' in data:
            data.pop('image/jpeg', None)  # Pillow makes both
            data['image/png'] = with_few_colours(data['image/png'])
    return notebook


def with_few_colours(png: str) -> str:
    """Return a picture, as text in base64, with a palette."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB').quantize(COLOURS, dither=Image.Dither.NONE)
    file = io.BytesIO()
    picture.save(file, format='png', optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(NOTEBOOK, Path(folder)), NOTEBOOK)


if __name__ == '__main__':
    main()
