"""What `make study` leaves in runs/study, as the small files that the tutorial loads.

    python nbs/experiments/study/record.py

`tidy.csv`: one row a trial, with its sweep's name. `record.json`: the accounts, the start, and seconds of training alone. `widths.json`: the start and the last policies of two
arms searched at widths from 1 to 30, each width a search of its own, and the place of the first valid beam in the widest."""
import json
from pathlib import Path

import torch

from bgrpo_nb.analysis import read_runs
from bgrpo_nb.beam_filter import search_problems
from bgrpo_nb.data import read_problems
from bgrpo_nb.model import load_model, load_tokenizer
from bgrpo_nb.processes import write_json
from bgrpo_nb.runs import accounts, read_metrics

HERE, STUDY = Path(__file__).parent, Path("runs/study")
SWEEPS = ("rollout", "rank", "lists", "original", "longer", "rates")
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)
SEARCHED = {("rank", "beam"): "BGRPO", ("rollout", "sample"): "GRPO"} # (sweep, rollout) -> arm


def results():
    "(sweep, folder, result.json) of each finished trial"
    for sweep in SWEEPS:
        for path in sorted((STUDY / sweep / "trials").glob("*/result.json")): yield sweep, path.parent, json.loads(path.read_text())


def training_seconds(folder, result):
    "Without the validations"
    return result["seconds"] - sum(row.get("eval_seconds", 0) for row in read_metrics(folder / "metrics.jsonl"))


def searched(policy, problems):
    "Places of the first valid beam (0: none), problem by problem, width by width"
    model, tokenizer = load_model(policy, device="cpu"), load_tokenizer(policy)
    found = {}
    for k in WIDTHS:
        verdicts = [s.verdicts for s in search_problems(model, tokenizer, problems, k)]
        found[k] = [next((i for i, v in enumerate(row, 1) if v), 0) for row in verdicts]
    return found


def main():
    torch.set_num_threads(1)
    problems = read_problems(STUDY / "held_out.txt")
    widths, seconds, start = {"start": [searched("tiny", problems)]}, {}, None
    for sweep, folder, result in results():
        kept = json.loads((folder / "config.json").read_text())
        settings = kept["fixed"] | kept["parameters"]
        arm = " ".join(str(settings[k]) for k in ("rollout", "reward", "baseline", "objective", "learning_rate", "max_steps") if k in settings)
        seconds.setdefault(arm, []).append(round(training_seconds(folder, result), 1))
        if name := SEARCHED.get((sweep, settings["rollout"])): widths.setdefault(name, []).append(searched(folder / "policy", problems))
        if sweep == "rank": start = result        # the other sweeps do not validate the policy that all begin with
    runs = read_runs(*(STUDY / s for s in SWEEPS))
    runs.table.insert(1, "sweep", [run.split("/")[0] for run in runs.table.run])
    runs.table["folder"] = [Path(f).resolve().relative_to(Path.cwd()) for f in runs.table.folder]
    runs.to_csv(HERE / "tidy.csv")
    write_json(HERE / "widths.json", {"widths": WIDTHS, "places": widths})
    write_json(HERE / "record.json", {"command": "make study", "training_seconds": seconds, "problems": start["problems"], "held_out": start["held_out"],
                                      "data": start["data"], "start": {k: v for k, v in start["first"].items() if k.startswith("eval_")}, **accounts(None)})


if __name__ == "__main__": main()
