"""What every floor may use: files, folders, processes, signals, settings, the style of figures.

- `assets`: the files that ship with the package: policies, vocabularies, styles, configs (`ASSETS`, `find_config`)
- `files`: files that are written whole or not at all (`write_text`, `replacing`, `filling`), and files that are read
  while they grow (`JsonlTail`, `last_lines`)
- `ownership`: which folders this package may write to (`claim_folder`, `locked`, `check_new_file`)
- `strict_yaml`: YAML files of settings, read as their author means them (`read_yaml`, `parse_yaml`)
- `settings`: a field of a config with its help text and range, and the reader of its value (`setting`, `settings_of`,
  `read_value`, `check_ranges`)
- `checkpoints`: which checkpoints are whole, and which one a run resumes from (`whole_or_nothing`,
  `checkpoints`, `newest_checkpoint`)
- `run_folder`: what a run leaves behind: config, metrics, result, and where they came from
  (`open_run`, `read_metrics`, `best_of`, `provenance`)
- `signals`: Ctrl-C, SIGTERM and a closed terminal (`handled`, `end_at_once`)
- `network`: with whom the package speaks over the network (`logged_in`, `report_nothing`)
- `processes`: child processes that end together with the process that started them (`start`, `end`, `follow`)
- `plotting`: the style of all figures (`use_style`)
- `extras`: packages that only some uses need (`need`)
"""
