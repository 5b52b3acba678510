"""Vectors, layouts, numerics, random seeds and checks that every other room uses."""
