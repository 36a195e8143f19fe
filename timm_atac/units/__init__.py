"""The layers of the paper. Start reading in `atac.py`."""

import timm.models  # noqa: F401  registers us with timm, see _autoload.py
