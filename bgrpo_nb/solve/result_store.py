"""The result store: files in which an evaluation stores results as they come; a killed process loses one batch at most.

One file holds one pass (a search of one width, or the samples) of one policy over one list of problems, one result a
line. When a file is opened again, an incomplete last line is cut off and the complete ones are read. The store depends
on neither searches nor verdicts."""
import fcntl
import hashlib
import json
from pathlib import Path

NOT_IN_FINGERPRINT = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}


def policy_fingerprint(model, tokenizer) -> str: # 64 hexadecimal digits
    "sha256 of a policy's weights, configuration and vocabulary; its name and folder do not count"
    import torch
    config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_IN_FINGERPRINT}
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256()
    digest.update(json.dumps([config, vocabulary], sort_keys=True, default=str).encode())
    for name, weights in sorted(model.state_dict().items()):
        digest.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
        digest.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe_file(path, n) -> dict: # name, sha256, n
    "What a result records about its data: name and sha256 of the file, and how many of its problems were used"
    return dict(name=Path(path).name, sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest(), n=n)


class ResultStore:
    "A folder of results. `identity` describes policy and data; `open` adds the settings of one pass"
    def __init__(self, folder, **identity): self.folder, self.identity = Path(folder), identity

    def open(self, title, **settings):
        "The results of one pass, to be used in a `with` statement"
        return StoredPass(self.folder, title, self.identity | settings)


class StoredPass:
    "Results of one pass. `found`: index of a problem -> its result. Without a folder, nothing is written"
    def __init__(self, folder=None, title="", identity=None):
        self.found, self.identity, self.file = {}, identity, None
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder and Path(folder) / f"{title}-{key}.jsonl"

    def __enter__(self):
        if self.path is not None:
            self._open_and_lock()
            self._read()
        return self

    def __exit__(self, *error):
        if self.file: self.file.close()

    def add(self, found):
        "Store the results of a batch, in one write"
        new = {index: result for index, result in found.items() if index not in self.found}
        self.found |= new
        if self.file: self._write([{"problem": index, **result} for index, result in new.items()])

    def _open_and_lock(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+b")
        except OSError as e:
            raise OSError(f"cannot write results to {self.path.parent} ({e.strerror}); choose another --out") from None
        try: fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OSError(f"another evaluation writes to {self.path}; wait for it, or choose another --out") from None

    def _read(self):
        "Find complete lines, cut off the rest; a file of another pass or format starts anew"
        self.file.seek(0)
        complete, _, _ = self.file.read().rpartition(b"\n")
        lines = complete.split(b"\n")
        records = [record for record in map(_parse, lines) if record is not None]
        if records and records[0] == self.identity:
            self.found = {record.pop("problem"): record for record in records[1:] if "problem" in record}
            self.file.truncate(sum(len(line) + 1 for line in lines))
        else:
            self.file.truncate(0)
            self._write([self.identity])

    def _write(self, records):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        self.file.write("".join(lines).encode())
        self.file.flush()


def _parse(line):
    "A line's record; None for what is none"
    try: record = json.loads(line)
    except (ValueError, RecursionError): return None
    return record if isinstance(record, dict) else None
