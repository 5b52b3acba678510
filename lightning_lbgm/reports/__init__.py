"""Reports of clients and rounds, the ledger of bits, and metrics by their public names."""
