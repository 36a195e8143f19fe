"""The package behind ablation.py, tables.py and digits.py, which puts its folder on sys.path."""
