"What a user writes in a project with a type checker; never run, see test_release.py"
from pathlib import Path

from bgrpo_nb import (
    BGRPOConfig, BGRPOTrainer, Beams, Decomposition, Problem, Report, TrainConfig, Verdict, VerifiedReward, beam_search,
    decompose, decompose_exact, evaluate, generate_problems, load_model, load_tokenizer, read_problems,
    save_model, train_bgrpo, verify, verify_batch, write_problems)

verdict: Verdict = verify("^ a P 4", "^ a P 2", domain="ZZ")
valid: bool = verdict.valid
outer: str | None = verdict.outer
verdicts: list[Verdict] = verify_batch(["^ a P 4"], [None])
pairs: list[tuple[str, str]] = decompose_exact("^ a P 4")

problems: list[Problem] = generate_problems(10, 2, 2, seed=1)
write_problems("problems.txt", problems)
again: list[Problem] = read_problems("problems.txt")

model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
ids = tokenizer(["a"], return_tensors="pt").input_ids
beams: Beams = beam_search(model, ids, num_beams=4, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
report: Report = evaluate(model, tokenizer, problems, num_beams=10)
accuracy: float = report.metrics["beam_accuracy"]
folder: Path = save_model(model, tokenizer, "policy")
found: list[Decomposition] = decompose("x**4 + 2*x**2 + 1")

config = BGRPOConfig(num_generations=4, rollout="beam", learning_rate=1e-5)
trainer = BGRPOTrainer("tiny", VerifiedReward(lambda prompt, ids: True), config)
result: dict = train_bgrpo(TrainConfig(max_steps=2), problems)
