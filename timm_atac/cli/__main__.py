"""`python -m timm_atac.cli` is `timm-atac`."""

import sys

from .main import main

sys.exit(main())
