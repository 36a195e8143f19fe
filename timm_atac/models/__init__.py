"""The networks that timm lists, a file for each family."""

from .._autoload import import_timm

import_timm()
