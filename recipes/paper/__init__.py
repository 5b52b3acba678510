"""The experiments of Azam et al., "Recycling Model Updates in Federated Learning" (ICLR 2022, arXiv 2202.00280)."""
