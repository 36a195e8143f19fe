"""The layers of the paper. Start reading in `atac.py`."""

import timm.models  # noqa: F401  (timm registers our networks before a module of this package needs timm)
