"""The program `timm-atac`, one file for each command. torch, timm and matplotlib are imported when a command runs."""

from .program import main

__all__ = ['main']
