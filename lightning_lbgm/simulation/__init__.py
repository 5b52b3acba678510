"""Simulation of a federation: a round as a transaction, clients' states, checkpoints and processes."""
