"""The stages of benchmarks/gpu.py. Each stage is a program: `python -m gpu_stages.STAGE --rows FILE`."""
