"""Groups, advantages, the trie and the trainer, for any task."""
