"""The training runs that commands start.

- `sft`: supervised training on problems with answers, `bgrpo sft` (`SupervisedConfig`, `train_policy`)
- `train`: BGRPO and GRPO on polynomials, `bgrpo train` (`TrainConfig`, `train_bgrpo`)
- `callbacks`: what both do besides their steps: log, draw, show progress, stop cleanly at a signal
- `trainer_settings`: what Transformers' trainer would refuse late, and settings that nothing reads
  (`check_scheduler`, `check_reports`, `refuse`)
- `flags`: what was typed or written in a file becomes a config (`read_config`)
- `demo`: filter, train, measure before and after, `bgrpo demo` (`run_demo`)
- `wandb_logging`: a run at W&B (`at_wandb`, `guard_wandb`, `WandbPanels`)
"""
