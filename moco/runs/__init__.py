"""Run folders: reading, comparison, recipes and sweeps, without torch."""
