"""The program `timm-atac`, one file for each command. torch, timm and matplotlib are imported when a command runs."""
