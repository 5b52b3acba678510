"""Runnable examples: one flat script for each, on real data."""
