"""Policies meet polynomials: search, verify, filter, evaluate, decompose.

- `decomposition`: a polynomial in, its verified decompositions out (`decompose`, `Decomposition`)
- `beam_filter`: search many problems, keep those that some beam solves (`search_problems`, `filter_by_beams`)
- `decomposition_reward`: the reward function of a decomposition, and when two answers are equal (`answer_key`)
- `grammar`: only well-formed prefix notation from a search (`PrefixGrammar`)
- `evaluation`: what one policy can do on one list of problems (`evaluate`, `Report`, `compare`)
- `test_sets`: many policies on many files (`evaluate_files`, `Results`)
- `result_store`, `evaluation_report`, `evaluation_figures`: how results are stored, written and drawn
"""
