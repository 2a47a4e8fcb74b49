"""Files that are written whole or not at all, and files that are read while another process writes them.

A file is first written under a name of its own and then renamed, so that a reader never sees half of it, and a process
that is killed leaves the old file as it was. A link is followed, and a device or a pipe is written to: neither is ever
replaced."""
import json
import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path

SPECIAL = ("/dev/", "/proc/")    # what is below is never replaced, whatever it is
PART = ".part-"                  # the names of what is being written begin so


def is_replaceable(path):
    "Can a new file take the place of `path`? Not where it is a device, a pipe or a folder"
    if os.path.abspath(path).startswith(SPECIAL): return False
    return Path(path).is_file() or not Path(path).exists()


def refuse_folder(path):
    "IsADirectoryError for a folder, also for one to be, whose name ends with a slash"
    if Path(path).is_dir() or str(path).endswith("/"):
        raise IsADirectoryError(f"{path} is a folder, where a file is needed; name a file in it")


def _beside(path):
    "A name in the same folder that nothing has, with the same suffix"
    return path.with_name(f"{PART}{secrets.token_hex(8)}{path.suffix}")


def target_of(path):
    "The path itself; of a link, what it leads to"
    target = Path(os.path.realpath(path))
    if target.is_symlink(): raise OSError(f"{path} is a link that leads to itself; choose another name")
    return target


@contextmanager
def replacing(path):
    "A path to write to; what is there when the block ends without an error takes the place of the file `path`"
    refuse_folder(path)
    if not is_replaceable(path):
        yield Path(path)
        return
    target = target_of(path)
    part = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if target.exists(): shutil.copymode(target, part)
        os.replace(part, target)
    except OSError as e:
        if e.errno is None: raise    # it says already what is wrong
        raise OSError(f"{path} cannot be written ({e.strerror}); free some space, or choose another place") from e
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def filling(folder):
    """An empty folder to write to; what is in it when the block ends without an error is moved into `folder`.

    Other files of `folder` stay. What goes wrong while it is written is one OSError, and `folder` is as it was."""
    target = target_of(folder)
    part = _beside(target)
    try:
        part.mkdir(parents=True)
        yield part
        target.mkdir(exist_ok=True)
        for path in part.iterdir(): os.replace(path, target / path.name)
    except write_errors() as e:
        raise OSError(f"{folder} cannot be written ({first_line(e)}); free some space and run the same command again, "
                      "a training with --resume") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_errors():
    "The errors of Python, torch and safetensors where something cannot be written"
    from safetensors import SafetensorError
    return OSError, RuntimeError, SafetensorError


def first_line(error):
    "What an error says, as one line"
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_text(path, text):
    "Write `text` as UTF-8, whole or not at all; makes missing folders; returns the path"
    with replacing(path) as part: part.write_text(text, encoding="utf-8")
    return Path(path)


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
