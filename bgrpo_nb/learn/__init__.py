"""Groups, advantages, the trie and the trainer, for any task.

- `rewards`: verdicts and beam ranks to rewards, rewards to advantages (`VerifiedReward`, `rewards_of`, `advantages_of`,
  `balance_rewards`, `first_of_each`; no torch)
- `trl_batching`: groups in TRL's rows, and their log-probabilities over a trie (`roll_out`, `share_groups`,
  `trie_logps`, `group_order`)
- `finite`: a training that stops before a NaN reaches weights or checkpoints (`FiniteTrainer`, `NotFinite`)
- `exact_resume`: a GRPO training that continues exactly after an interruption (`ResumableGRPOTrainer`)
- `trainer`: GRPO whose group is the beams of a search (`BGRPOConfig`, `BGRPOTrainer`)
"""
