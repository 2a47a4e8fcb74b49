"""The training runs that commands start.

- `sft`: supervised training on problems with answers, `bgrpo sft` (`SupervisedConfig`, `train_policy`)
- `train`: BGRPO and GRPO on polynomials, `bgrpo train` (`TrainConfig`, `train_bgrpo`)
- `callbacks`: what both do besides their steps: log, draw, show progress, stop cleanly at a signal
- `wandb_logging`: a run at W&B (`start_wandb`, `WandbPanels`, `stop_wandb`)
"""
