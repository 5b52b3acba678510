"""Compression methods, one file each with its own payload."""
