"""A network as a folder of the Hugging Face Hub, and the upload of such a folder."""

import timm.models  # noqa: F401  (timm registers our networks before a module of this package needs timm)
