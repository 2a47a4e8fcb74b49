"""What an evaluation has found, kept as it comes: one line a problem, one file for each policy, problems and settings.

Plumbing of `evaluate`; it knows neither searches nor verdicts. A line is written when its batch is done, so that a process that is killed loses
one batch at most; a torn last line is cut off when the file is opened again."""
import fcntl
import hashlib
import json
from pathlib import Path

NOT_IN_FINGERPRINT = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}


def policy_fingerprint(model, tokenizer):
    "sha256 of a policy: weights as they are loaded, configuration, vocabulary; where it lies and what it is called do not count"
    import torch
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_IN_FINGERPRINT}
    digest.update(json.dumps([config, sorted(tokenizer.get_vocab().items())], sort_keys=True, default=str).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe_file(path, n):
    "What a result says about its data: the file's name, its sha256, and how many of its problems were used"
    return dict(name=Path(path).name, sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest(), n=n)


class ResultStore:
    "A folder of results; `identity` names policy and data, `open` adds the settings of one pass"
    def __init__(self, folder, **identity): self.folder, self.identity = Path(folder), identity

    def open(self, title, **settings): return StoredPass(self.folder, title, self.identity | settings)


class StoredPass:
    "Results of one pass: place of a problem -> what was found. A context manager; `folder` None keeps nothing on disk"
    def __init__(self, folder=None, title="", identity=None):
        self.found, self.identity, self.file = {}, identity, None
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder and Path(folder) / f"{title}-{key}.jsonl"

    def __enter__(self):
        if self.path is None: return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+b")
        except OSError as e: raise OSError(f"results cannot be kept in {self.path.parent} ({e.strerror}); choose another --out") from None
        try: fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError: raise OSError(f"another evaluation writes to {self.path}; wait for it, or choose another --out") from None
        self.file.seek(0)
        whole = self.file.read().rpartition(b"\n")[0].split(b"\n")   # what stands behind the last line end is torn
        rows = [row for row in map(_read, whole) if row is not None]
        if rows and rows[0] == self.identity: self.found = {row["problem"]: {k: v for k, v in row.items() if k != "problem"} for row in rows[1:]}
        else: whole = []
        self.file.truncate(sum(len(line) + 1 for line in whole))
        if not whole: self._write([self.identity])
        return self

    def __exit__(self, *error):
        if self.file: self.file.close()

    def add(self, found):
        "Keep what was found for a batch, in one write"
        new = {i: row for i, row in found.items() if i not in self.found}
        self.found |= new
        if self.file: self._write([{"problem": i, **row} for i, row in new.items()])

    def _write(self, rows):
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self.file.flush()


def _read(line):
    try: return json.loads(line)
    except ValueError: return None
