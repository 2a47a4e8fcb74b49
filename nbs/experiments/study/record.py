"""What `make study` leaves in runs/study, as the small files that the tutorial loads.

    python nbs/experiments/study/record.py

- `tidy.csv`: one row a trial, with its sweep and its way to learn, seconds of training alone, and tokens.
- `record.json`: provenance, and the metrics of the policy that every run starts from.
- `widths.json`: that policy and the last policies of two ways, searched at widths from 1 to 30, each width a search of
  its own: the share of problems solved and, for the widest, the place of the first valid beam of each problem, 0 where
  there is none.

Rows of sweeps that runs/study does not hold stay as they are."""
import json
from pathlib import Path

import pandas as pd
import torch

from bgrpo_nb.algebra.problems import read_problems
from bgrpo_nb.base.files import write_json
from bgrpo_nb.base.run_folder import provenance, read_metrics
from bgrpo_nb.policy.model import load_model, load_tokenizer
from bgrpo_nb.solve.beam_filter import search_problems
from bgrpo_nb.study.analysis import read_runs

HERE, STUDY = Path(__file__).parent, Path("runs/study")
SWEEPS = ("rollout", "rank", "lists", "credit", "forms", "original", "longer", "rates")
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)
SEARCHED = ("BGRPO", "GRPO")
OF_ROLLOUT = {"beam": "BGRPO without rank", "mixed": "half beams, half samples", "sample": "GRPO"}
OF_BASELINE = {"right_only": "right ones only", "minimum_risk": "minimum risk"}
SETTINGS = ("rollout", "baseline", "eval_on_start", "eval_steps", "learning_rate", "max_steps", "reward", "save_steps",
            "warmup_steps", "canonical_only", "credit_once")    # as the sweeps give them
OF_WIDTHS = ("rank", "rollout")    # sweeps whose policies are searched at every width


def way_of(sweep, settings):
    "A trial's way to learn"
    if sweep == "rank": return "BGRPO"
    if sweep == "original": return "BGRPO, original objective"
    if sweep == "longer": return f"GRPO, {settings['max_steps']} steps"
    if sweep == "lists": return f"{OF_BASELINE[settings['baseline']]}, {settings['rollout']}s"
    if sweep == "credit": return settings["baseline"]
    if sweep == "forms": return "one form" if settings["canonical_only"] else "credit once"
    way = OF_ROLLOUT[settings["rollout"]]
    return f"{way}, rate {settings['learning_rate']:g}" if sweep == "rates" else way


def search_widths(policy, problems):
    "Share solved at each width; places of the first valid beam at the last"
    model, tokenizer, solved = load_model(policy, device="cpu"), load_tokenizer(policy), []
    for k in WIDTHS:
        verdicts = [s.verdicts for s in search_problems(model, tokenizer, problems, k)]
        places = [next((place for place, valid in enumerate(row, 1) if valid), 0) for row in verdicts]
        solved.append(sum(place > 0 for place in places) / len(places))
    return {"solved": solved, "places": places}


def describe_trial(row):
    "What the table adds to a trial: sweep, way, seconds of training alone, tokens, and a folder of this checkout"
    folder = Path(row.folder)
    sweep = folder.parent.parent.name
    config, metrics = json.loads((folder / "config.json").read_text()), read_metrics(folder / "metrics.jsonl")
    validating, settings = sum(m.get("eval_seconds", 0) for m in metrics), config["fixed"] | config["parameters"]
    given = {name: str(settings.get(name, "")) for name in SETTINGS}
    return given | {"sweep": sweep, "way": way_of(sweep, settings),
            "training_seconds": round(row.seconds - validating, 1),
            "tokens": max(m.get("num_tokens", 0) for m in metrics),
            "folder": str(folder.resolve().relative_to(Path.cwd()))}


def kept(done):
    "Rows that tidy.csv holds of sweeps which have not been run here"
    file = HERE / "tidy.csv"
    if not file.exists(): return pd.DataFrame()
    rows = as_written(file)
    return rows[~rows.sweep.isin(done)]


def as_written(file): return pd.read_csv(file, dtype=str, keep_default_na=False)


def record_widths(runs):
    "record.json and widths.json, of the sweeps whose policies are there"
    problems = read_problems(STUDY / "held_out.txt")
    widths = {"start": [search_widths("tiny", problems)]}
    for _, row in runs.table.iterrows():
        policy = Path(row.folder) / "policy"
        if row.way in SEARCHED: widths.setdefault(row.way, []).append(search_widths(policy, problems))
        if row.way == "BGRPO":    # the other sweeps do not validate the policy that all begin with
            start = json.loads((policy.parent / "result.json").read_text())
    (HERE / "widths.json").write_text(json.dumps({"widths": WIDTHS, "ways": widths}) + "\n")
    first = {k: v for k, v in start["first"].items() if k.startswith("eval_")}
    write_json(HERE / "record.json", {
        "command": "make study", "problems": start["problems"], "held_out": start["held_out"], "data": start["data"],
        "start": first, **provenance(None)})


def main():
    torch.set_num_threads(1)
    done = [sweep for sweep in SWEEPS if (STUDY / sweep).exists()]
    if not done: raise SystemExit("runs/study holds no sweep of the study; make study runs them")
    runs = read_runs(*(STUDY / sweep for sweep in done))
    for name in SETTINGS: runs.table[name] = ""    # those that all runs share, too; as text
    for i, row in runs.table.iterrows():
        trial = describe_trial(row)
        runs.table.loc[i, list(trial)] = list(trial.values())
    if {*OF_WIDTHS} <= {*done}: record_widths(runs)
    rows = as_written(runs.to_csv(STUDY / "tidy.csv"))
    rows["run"] = rows.sweep + "/" + rows.folder.map(lambda folder: Path(folder).name)
    pd.concat([kept(done), rows]).fillna("").to_csv(HERE / "tidy.csv", index=False)


if __name__ == "__main__": main()
