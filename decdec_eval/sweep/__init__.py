"""A grid of runs, described in YAML -> one JSON file per cell, resumable."""
