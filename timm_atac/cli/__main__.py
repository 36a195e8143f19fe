"""`python -m timm_atac.cli` is `timm-atac`."""

import sys

from . import main

sys.exit(main())
