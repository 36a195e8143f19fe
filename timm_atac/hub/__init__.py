"""A network as a folder of the Hugging Face Hub, and the upload of such a folder."""

import timm.models  # noqa: F401  registers us with timm, see _autoload.py
