"""Hub folders: a network with its config, model card and picture, and the push of such a folder."""

from .._autoload import import_timm

import_timm()
