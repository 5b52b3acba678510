"""Callbacks: metrics, tables and figures of a federation, in every logger."""
