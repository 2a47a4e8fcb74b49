"""Vocabularies, sizes and checkpoints of a policy.

- `loading`: a name, a folder or a hub id becomes a policy; what does not fit is refused (`load_model`, `save_model`,
  `read_tokenizer`, `check_finite`, `choose_attention`)
- `model`: vocabularies, text to ids and back, policies with random weights (`load_tokenizer`, `encode`,
  `decode_completions`, `PRESETS`, `new_model`)
- `checkpoints`: the authors' checkpoints to Hugging Face folders, and back (`convert_checkpoint`)
"""
