"""The training runs that commands start.

- `sft`: supervised training on problems with answers, `bgrpo sft` (`SupervisedConfig`, `train_policy`)
- `train`: BGRPO and GRPO on polynomials, `bgrpo train` (`TrainConfig`, `train_bgrpo`)
- `callbacks`: what both do besides their steps: log, draw, show progress, stop cleanly at a signal
- `demo`: filter, train, measure before and after, `bgrpo demo` (`run_demo`)
- `wandb_logging`: a run at W&B (`start_wandb`, `WandbPanels`, `stop_wandb`)
"""
