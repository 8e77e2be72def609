"""The training engine: state, step, guards, saving; it knows no method."""
