"""A search for settings with accuracy and bytes as two objectives: see ``__main__.py``."""
