"""The layers of the paper. Start reading in `atac.py`."""

from .._autoload import import_timm

import_timm()
