"""Files that are written whole or not at all, and files that are read while another process writes them.

A file is first written under another name and then renamed, so that a reader never sees half of it, and a process
that is killed leaves the old file as it was."""
import json
import os
from pathlib import Path


def write_text(path, text):
    "Write `text` as UTF-8, whole or not at all; makes missing folders; returns the path"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def write_json(path, content):
    "Write `content` as indented JSON, whole or not at all; what JSON cannot hold is written as `str`"
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    return write_text(path, text + "\n")


class JsonlTail:
    "Reads a JSON Lines file that is still growing; each whole line is read once"
    def __init__(self, path):
        self.path = path
        self.position = 0    # in bytes: what is before it was read

    def new(self):
        "Rows that were added since the last call; a line without its end waits for the next call"
        if not self.path.exists(): return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            added = file.read()
        whole = added[:added.rfind(b"\n") + 1]
        self.position += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]


def last_lines(log, lines=1, reach=4000):
    "The last non-empty lines of a text file, looked for in its last `reach` bytes; empty if it cannot be read"
    try: end = Path(log).read_bytes()[-reach:]
    except OSError: return ""
    text = end.decode("utf-8", "replace")
    found = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(found[-lines:])
