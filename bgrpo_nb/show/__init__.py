"""Explorers: what a search finds and what a training step teaches, to see and to move."""
