"""`.params` files, arrays, state dicts and folders of weights. Imports nothing: `params.py` needs NumPy only."""
