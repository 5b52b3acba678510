"""Leave out the examples of parts that need what is not installed: Flower is not for every Python."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("flwr") else ["lightning_lbgm/flower/*"]
