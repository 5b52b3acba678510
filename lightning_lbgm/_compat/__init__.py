"""Lightning's private names and its twin package, and nothing else."""
