"""Several configs of one recipe, trained and compared: see ``__main__.py``."""
