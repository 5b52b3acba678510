"""Basics for all other rooms: flat vectors, layouts, numerics, random seeds and checks."""
