"""The stages of benchmarks/gpu.py. Each is a program: `python -m gpu_stages.STAGE --rows FILE`."""
