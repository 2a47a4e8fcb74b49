"""The training runs that commands start."""
