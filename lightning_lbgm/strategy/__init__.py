"""Lightning strategy: Lightning's hooks, connected to a federation."""
