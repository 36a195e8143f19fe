"""Hub folders: a network with its config, model card and picture, and the push of such a folder."""

import timm.models  # noqa: F401  (timm registers our networks before a module of this package needs timm)
