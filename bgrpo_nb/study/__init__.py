"""Many runs: planned, carried out, read, compared, reported.

- `sweeps`, `trials`, `launcher`: a sweep's file, the trials of its plan, the processes that carry them out
- `run_readers`: runs from folders, Optuna, W&B and its exports
- `run_table`: every run a row
- `permutation_tests`: could chance do the same?
- `analysis`: `read_runs` and what a `RunTable` can be asked: pairs, differences, conclusions, importance, a report
- `analysis_figures`, `analysis_report`: how that is drawn and written
"""
from bgrpo_nb.base.extras import need

need("study", "optuna", "pandas", "sklearn")
