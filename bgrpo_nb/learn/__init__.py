"""Groups, advantages, the trie and the trainer, for any task.

- `rewards`: verdicts and beam ranks to rewards, rewards to advantages (`VerifiedReward`, `rewards_of`, `advantages_of`,
  `balance_rewards`, `first_of_each`; no torch)
- `ranking`: lists with one right answer (`TargetReward`, `hit_rate`, `ndcg`)
- `siblings`: an advantage for each token, from the forks of the trie (`sibling_advantages`; no torch)
- `trl_batching`: groups in TRL's rows (`roll_out`, `share_groups`, `group_order`)
- `trie`: log-probabilities of a group, each distinct beginning forwarded once (`trie_logps`); `output_head`: the logits
  of a large vocabulary, a piece at a time
- `finite`: a training that stops before a NaN reaches weights or checkpoints (`FiniteTrainer`, `NotFinite`)
- `exact_resume`: a GRPO training that continues exactly after an interruption (`ResumableGRPOTrainer`)
- `group_rewards`: what depends on all completions of a prompt (`GroupRewardsTrainer`)
- `gradients`: log-probabilities and gradients of a step over tries, in parts where memory ends (`TrieGradientsTrainer`)
- `trainer`: GRPO whose group is the beams of a search (`BGRPOConfig`, `BGRPOTrainer`)
"""
