"""A training run: its start, its loop over the steps, its checkpoints, and what it writes to its output directory."""
