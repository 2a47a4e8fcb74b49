"""Checkpoints of Hugging Face trainers in a run's folder: which are whole, and which one a run resumes from.

When a checkpoint is written, a seal with the size and SHA-256 of each of its files is added, and then
`trainer_state.json`, which the seal describes as well. So a checkpoint is whole when both are there and the sizes are
right. Before a run resumes, the hashes are compared, too. Checkpoints without a seal are read as far as that is
possible without torch."""
import hashlib
import json
import os
import shutil
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

from bgrpo_nb.base.files import PART, first_line, replacing, write_errors, write_json

SEAL, STATE = "seal.json", "trainer_state.json"


def step_of(checkpoint): # a folder `checkpoint-STEP`
    "The step after which a checkpoint was written"
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoint_folders(folder):
    "Folders named `checkpoint-STEP`, whole or not, oldest first"
    found = Path(folder).glob("checkpoint-*")
    numbered = [path for path in found if path.is_dir() and path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(numbered, key=step_of)


# The seal

def _sha256(path):
    with path.open("rb") as file: return hashlib.file_digest(file, "sha256").hexdigest()


def _described(path): return dict(size=path.stat().st_size, sha256=_sha256(path))


def seal(checkpoint, state): # the file that will be `trainer_state.json`
    "Write sizes and hashes of a checkpoint's files into it"
    def is_sealed(path): return path.is_file() and path.name not in (SEAL, STATE) and not path.name.startswith(PART)
    files = sorted(filter(is_sealed, checkpoint.rglob("*")))
    described = {str(path.relative_to(checkpoint)): _described(path) for path in files}
    return write_json(checkpoint / SEAL, described | {STATE: _described(state)})


@contextmanager
def _sealed_with(state): # a TrainerState
    "While the block runs, writing the state seals the checkpoint first: both are there, or the state is not"
    write = state.save_to_json

    def seal_and_write(path):
        with replacing(path) as part:
            write(part)
            seal(part.parent, part)
    state.save_to_json = seal_and_write
    try: yield
    finally: del state.save_to_json


def _faults(checkpoint, hashes):
    "What is wrong with the files of a checkpoint, one line each"
    yield from _faults_of_state(checkpoint)
    if (checkpoint / SEAL).exists(): yield from _faults_by_seal(checkpoint, hashes)
    else: yield from _faults_by_content(checkpoint)


def _faults_of_state(checkpoint):
    try: state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError): state = None
    step = checkpoint.name.removeprefix("checkpoint-")
    if not isinstance(state, dict) or step.isdecimal() and state.get("global_step") != int(step):
        yield "it was not written to its end"


def _faults_by_seal(checkpoint, hashes):
    "Files that are missing or have another size, or with `hashes` another content, than when they were written"
    try:
        for name, file in json.loads((checkpoint / SEAL).read_text(encoding="utf-8")).items():
            path = checkpoint / name
            if not path.is_file(): yield f"{name} is missing"
            elif path.stat().st_size != file["size"]: yield f"{name} has {path.stat().st_size} of {file['size']} bytes"
            elif hashes and _sha256(path) != file["sha256"]: yield f"the content of {name} has changed"
    except (OSError, ValueError, TypeError, AttributeError, KeyError): yield f"{SEAL} cannot be read"


def _faults_by_content(checkpoint):
    "Files that cannot be whole: without a seal this is all that can be found out"
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and not _is_readable(path): yield f"{path.name} is incomplete"


def _is_readable(path):
    "Is a file that Transformers wrote complete, as far as its format tells?"
    try:
        if path.suffix == ".json": return json.loads(path.read_text(encoding="utf-8")) is not None
        if path.suffix in (".pt", ".pth", ".bin"): return zipfile.is_zipfile(path)
        if path.suffix == ".safetensors": return path.stat().st_size == _size_of_safetensors(path)
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError): return False
    return True


def _size_of_safetensors(path):
    "The size that the header of the file asks for, in bytes"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, 100_000_000)))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def _missing_parts(checkpoint):
    "What a training needs to continue and the checkpoint does not have"
    names = [path.name for path in checkpoint.iterdir()]
    for part, starts in (("weights", ("model", "adapter_model", "pytorch_model", "global_step")),
                         ("optimizer", ("optimizer", "global_step"))):
        if not any(name.startswith(starts) for name in names): yield f"it has no {part}"


def processes_of(checkpoint):
    "How many processes wrote a checkpoint: each leaves its random numbers"
    return len(list(checkpoint.glob("rng_state*.pth"))) or 1


# Which one a run resumes from

def is_whole(checkpoint):
    "Was this checkpoint written to its end, and are all its files as long as they were?"
    return next(_faults(checkpoint, hashes=False), None) is None


def checkpoints(folder):
    "The whole checkpoints in a run's folder, oldest first"
    return [path for path in checkpoint_folders(folder) if is_whole(path)]


def why_not_resume(checkpoint):
    "Why a training cannot continue from this checkpoint, in words; None if it can"
    for fault in _faults(checkpoint, hashes=True): return fault
    return next(_missing_parts(checkpoint), None)


def newest_checkpoint(folder):
    "The newest checkpoint that a run can resume from; FileNotFoundError if there is none"
    faults = []
    for checkpoint in reversed(checkpoint_folders(folder)):
        fault = why_not_resume(checkpoint)
        if fault is None:
            for name, why in reversed(faults):
                warnings.warn(f"{folder}/{name} is ignored, {why}; the run continues from {checkpoint.name}")
            return checkpoint
        faults.append((checkpoint.name, fault))
    found = "".join(f"; {name}: {why}" for name, why in faults)
    raise FileNotFoundError(f"{folder} holds no whole checkpoint to resume from{found}; leave out --resume "
                            "(resume_from_checkpoint) to start")


def checkpoint_of(asked, output_dir): # a folder; True: the newest whole one in output_dir; None or False: none
    "The checkpoint that a training continues from; ValueError if it is damaged"
    if not asked: return None
    if asked is True: return newest_checkpoint(output_dir)
    if not Path(asked).is_dir(): raise FileNotFoundError(f"{asked} is no folder; name one such as checkpoint-50")
    fault = next(_faults(Path(asked), hashes=True), None)
    if fault: raise ValueError(f"{asked} cannot be resumed, {fault}; name another checkpoint")
    return asked


def can_resume(folder):
    "Is there a checkpoint that a run can resume from?"
    return any(why_not_resume(checkpoint) is None for checkpoint in reversed(checkpoint_folders(folder)))


def set_aside(folder, checkpoint=None):
    "Move away what a run cannot use and a trainer would count; damaged checkpoints become `damaged-STEP`"
    newer = -1 if checkpoint is None else step_of(checkpoint)
    for path in checkpoint_folders(folder):
        if is_whole(path) and step_of(path) <= newer: continue
        damaged = path.with_name(f"damaged-{step_of(path)}")
        shutil.rmtree(damaged, ignore_errors=True)
        if (path / STATE).exists() and (path / SEAL).exists(): os.rename(path, damaged)
        else: shutil.rmtree(path)


@contextmanager
def whole_or_nothing(folder, state, main=True): # of the run; the trainer's state; whether this process writes it
    "Around the writing of a sealed checkpoint: OSError says which is the last whole one, and the part is removed"
    step = state.global_step
    try:
        with _sealed_with(state): yield
    except write_errors() as e:
        if main: shutil.rmtree(Path(folder) / f"checkpoint-{step}", ignore_errors=True)
        last = (checkpoints(folder) or ["none"])[-1]
        raise OSError(f"the checkpoint at step {step} cannot be written ({first_line(e)}); "
                      f"the last whole one is {last}. Free some space and continue with --resume") from e


def load_finished(trainer, checkpoint):
    """Whether a checkpoint holds every step that the trainer is asked for; its weights and state are then loaded.

    Transformers' trainer would take one step more."""
    from transformers import TrainerState
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    steps, epochs = trainer.args.max_steps, trainer.args.num_train_epochs
    if not (state.global_step >= steps if steps > 0 else (state.epoch or 0) >= epochs): return False
    trainer.state = state
    trainer._load_from_checkpoint(str(checkpoint))
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint: trainer._load_best_model()
    return True
