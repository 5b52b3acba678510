"""Runnable examples: scripts, and packages of several files for the paper and for comparisons."""
