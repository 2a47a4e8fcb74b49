"""Files that are written whole or not at all, and files that are read while they grow."""
import json
import os
from pathlib import Path


def write_text(path, text):
    "Write `text` whole or not at all"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def write_json(path, content):
    "Write `content` as JSON, whole or not at all"
    return write_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


class JsonlTail:
    "Whole lines of a growing JSON Lines file, each read once"
    def __init__(self, path): self.path, self.at = path, 0

    def new(self):
        if not self.path.exists(): return []
        with self.path.open("rb") as file:
            file.seek(self.at)
            text = file.read()
        text = text[:text.rfind(b"\n") + 1]
        self.at += len(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def last_lines(log, lines=1, reach=4000):
    "The end of a log: its last non-empty lines"
    try: text = Path(log).read_bytes()[-reach:].decode("utf-8", "replace")
    except OSError: return ""
    return "\n".join([row.strip() for row in text.splitlines() if row.strip()][-lines:])
