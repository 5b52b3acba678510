"""Figures of a run, drawn with matplotlib, which is imported when one is drawn."""
