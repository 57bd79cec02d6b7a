"""The machine: what it has, how fast it is, how much memory is left."""
