"""A Flower app: handwritten digits, one partition a node."""
