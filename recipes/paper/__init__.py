"""The experiments of the LBGM paper (Azam et al., ICLR 2022, arXiv 2202.00280) as configs for one command line."""
