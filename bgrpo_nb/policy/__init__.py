"""Vocabularies, sizes and checkpoints of a policy.

- `model`: the tokenizer, policies with random weights, load and save (`load_tokenizer`, `encode`, `decode_completions`,
  `PRESETS`, `new_model`, `load_model`, `save_model`)
- `checkpoints`: the authors' checkpoints to Hugging Face folders, and back (`convert_checkpoint`)
"""
