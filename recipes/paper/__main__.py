"""Run an experiment: ``python -m recipes.paper fit --config recipes/paper/fmnist_cnn_noniid.yaml``."""

from recipes.paper.cli import main

if __name__ == "__main__":
    main()
