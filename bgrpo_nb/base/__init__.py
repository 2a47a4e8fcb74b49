"""What every floor may use: files, processes, the folder of a run, settings, the style of figures."""
