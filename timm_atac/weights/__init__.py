"""`.params` files, arrays, state dicts and folders of weights. `params.py` needs only NumPy."""
