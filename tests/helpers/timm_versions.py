"""What older versions of timm cannot do."""

import pytest
import timm
from packaging.version import Version

TIMM = Version(timm.__version__)
KEEPS_ARGS = Version('1.0.31') <= TIMM  # timm keeps a model's arguments, and writes them
SAFE_FOLDERS = Version('1.0.26') <= TIMM

needs_safe_folders = pytest.mark.skipif(
    not SAFE_FOLDERS, reason='`local-dir:` of timm before 1.0.26 reads .safetensors as if it were a pickle'
)
