"""Token ids in, ranked completions out, for any causal model."""
