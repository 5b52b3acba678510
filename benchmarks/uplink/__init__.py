"""Accuracy against bytes for chains of the uplink and the downlink: ``python -m benchmarks.uplink``."""
