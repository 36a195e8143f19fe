"""The program `timm-atac`, a file for each command. Imports nothing: a help text takes no seconds."""
