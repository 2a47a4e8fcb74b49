"""What `make study` leaves in runs/study, as the small files that the tutorial loads.

    python nbs/experiments/study/record.py

`tidy.csv`: one row a trial, with its sweep and the way that it learnt, seconds of training alone and tokens. `record.json`: the accounts and the start.
`widths.json`: the start and the last policies of two ways, searched at widths from 1 to 30, each width a search of its own: the share solved, and for
the widest the place of the first valid beam, problem by problem, 0 where there is none."""
import json
from pathlib import Path

import torch

from bgrpo_nb.study.analysis import read_runs
from bgrpo_nb.solve.beam_filter import search_problems
from bgrpo_nb.algebra.problems import read_problems
from bgrpo_nb.policy.model import load_model, load_tokenizer
from bgrpo_nb.base.files import write_json
from bgrpo_nb.base.run_folder import provenance, read_metrics

HERE, STUDY = Path(__file__).parent, Path("runs/study")
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)
SEARCHED = ("BGRPO", "GRPO")
WAYS = { # sweep -> its way to learn, from a trial's settings
    "rollout": lambda s: {"beam": "BGRPO without rank", "mixed": "half beams, half samples", "sample": "GRPO"}[s["rollout"]],
    "rank": lambda s: "BGRPO",
    "lists": lambda s: {"right_only": "right ones only", "minimum_risk": "minimum risk"}[s["baseline"]] + f", {s['rollout']}s",
    "original": lambda s: "BGRPO, original objective",
    "longer": lambda s: f"GRPO, {s['max_steps']} steps",
    "rates": lambda s: {"beam": "BGRPO without rank", "sample": "GRPO"}[s["rollout"]] + f", rate {s['learning_rate']:g}",
}


def searched(policy, problems):
    "Share solved at each width; places of the first valid beam at the last"
    model, tokenizer, solved = load_model(policy, device="cpu"), load_tokenizer(policy), []
    for k in WIDTHS:
        verdicts = [s.verdicts for s in search_problems(model, tokenizer, problems, k)]
        places = [next((i for i, v in enumerate(row, 1) if v), 0) for row in verdicts]
        solved.append(sum(place > 0 for place in places) / len(places))
    return {"solved": solved, "places": places}


def main():
    torch.set_num_threads(1)
    problems = read_problems(STUDY / "held_out.txt")
    runs, widths, start = read_runs(*(STUDY / sweep for sweep in WAYS)), {"start": [searched("tiny", problems)]}, None
    for i, row in runs.table.iterrows():
        folder, sweep = Path(row.folder), Path(row.folder).parent.parent.name
        kept, metrics = json.loads((folder / "config.json").read_text()), read_metrics(folder / "metrics.jsonl")
        way = WAYS[sweep](kept["fixed"] | kept["parameters"])
        runs.table.loc[i, ["sweep", "way", "training_seconds", "tokens"]] = (
            sweep, way, round(row.seconds - sum(m.get("eval_seconds", 0) for m in metrics), 1), max(m.get("num_tokens", 0) for m in metrics))
        runs.table.loc[i, "folder"] = str(folder.resolve().relative_to(Path.cwd()))
        if way in SEARCHED: widths.setdefault(way, []).append(searched(folder / "policy", problems))
        if way == "BGRPO": start = json.loads((folder / "result.json").read_text())  # the other sweeps do not validate the policy that all begin with
    runs.to_csv(HERE / "tidy.csv")
    (HERE / "widths.json").write_text(json.dumps({"widths": WIDTHS, "ways": widths}) + "\n")
    write_json(HERE / "record.json", {"command": "make study", "problems": start["problems"], "held_out": start["held_out"], "data": start["data"],
                                      "start": {k: v for k, v in start["first"].items() if k.startswith("eval_")}, **provenance(None)})


if __name__ == "__main__": main()
