"""What every floor may use: files, processes, run folders, settings, the style of figures.

- `assets`: the folder of the bundled policies, vocabularies and styles (`ASSETS`)
- `files`: files that are written whole or not at all (`write_text`, `write_json`) and files that are read while they
  grow (`JsonlTail`, `last_lines`)
- `settings`: a field of a config with its help text (`setting`)
- `run_folder`: what a run leaves behind: config, metrics, checkpoints, result, and where they came from
  (`open_run`, `checkpoints`, `newest_checkpoint`, `read_metrics`, `best_of`, `provenance`)
- `processes`: child processes that end together with the process that started them (`start`, `end`, `follow`)
- `plotting`: the style of all figures (`use_style`)
- `extras`: packages that only some uses need (`need`)
"""
