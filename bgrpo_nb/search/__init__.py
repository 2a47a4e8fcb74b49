"""Token ids in, ranked completions out, for any causal model.

- `generation`: `beam_search`, `sample` and `greedy`, which read each prompt once and return `Beams`
- `constraints`: `Constraint`, what a search may write; `allowed_sequences`: `AllowedSequences`, a finite set as one
- `beam_tree`: `BeamTree`, all beams of a prompt as one tree of tokens; `why_no_tree`, which models cannot use it
- `custom_generate`: `tree_generate`, the same search inside of `generate`
- `captured`: a recorded step, and `release_graphs`; `memory`: `in_parts`, halves of what does not fit
- `decoding`: what a search has written, and the loop of all searches
- `packed_weights`: `packed_linears`, faster products on a CPU and weights cast once under autocast, in a search
"""
