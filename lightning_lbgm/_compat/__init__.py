"""Private names of Lightning and the bridge to its twin package ``pytorch_lightning``, and nothing else."""
