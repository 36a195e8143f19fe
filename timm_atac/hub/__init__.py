"""Hub folders: a network with its config, model card and picture, and the push of such a folder."""

import timm.models  # noqa: F401  registers us with timm, see _autoload.py
