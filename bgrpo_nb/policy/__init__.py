"""Vocabularies, sizes and checkpoints of a policy."""
