"""Policies recommend: items as semantic IDs, histories as prompts, beams as ranked lists; no polynomials.

- `catalogue`: items, IDs, histories and their files; prompts and the constraint (`Catalogue`, `read_histories`)
- `latent_factors`: a world whose best possible list is known (`LatentWorld`, `best_ndcg`)
- `recommender`: a policy, its supervised training, its lists and what they are worth (`recommend`, `measure_lists`)
"""
