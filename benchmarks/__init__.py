"""Measurements of the package: each module runs as ``python -m benchmarks.NAME``."""
