"""Which files and folders this package may write to: new ones, empty folders, and folders that carry its mark.

The mark is a small file that says what a folder holds. A folder without it belongs to somebody else, whatever its
files are called: nothing is written there, and the message names what is in it. Folders of earlier versions, which
wrote no mark, are known by their content."""
import fcntl
import json
import os
from contextlib import contextmanager
from pathlib import Path

from bgrpo_nb.base.files import PART, is_replaceable, refuse_folder, target_of

MARK = ".bgrpo_nb.json"
HARMLESS = {MARK, ".DS_Store", "lost+found", ".ipynb_checkpoints"}    # nothing of anybody's is in these


def contents(folder):
    "The names in a folder that are somebody's, sorted; none where there is no folder"
    if not Path(folder).exists(): return []
    names = {path.name for path in Path(folder).iterdir()} - HARMLESS
    return sorted(name for name in names if not name.startswith(PART))


def mark_of(folder):
    "What the mark of a folder says; `{}` for a mark that was cut short, None without a mark"
    try: said = json.loads((Path(folder) / MARK).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError): return None
    except ValueError: return {}
    return said if isinstance(said, dict) else {}


def check_owner(folder, *kinds, flag="--output_dir", was_ours=lambda folder: False):
    """FileExistsError unless the folder is new, empty, or marked as one of `kinds`; nothing is written.

    `was_ours(folder)` knows folders of earlier versions, which have no mark."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, where a folder is needed; choose another {flag}")
    if folder.is_symlink() and not folder.exists():
        raise FileNotFoundError(f"{folder} is a link that leads nowhere; choose another {flag}")
    said, names = mark_of(folder), contents(folder)
    if said is None and names and not was_ours(folder):
        raise FileExistsError(f"{folder} holds what this program did not write ({_listed(names)}); "
                              f"choose another {flag}")
    if said and said.get("kind") not in kinds:
        raise FileExistsError(f"{folder} is the folder of another kind ({said.get('kind')}, here {kinds[0]}); "
                              f"choose another {flag}")


def claim_folder(folder, *kinds, flag="--output_dir", was_ours=lambda folder: False):
    "Mark a folder as one of the first of `kinds`, and make it if it is missing; errors as of `check_owner`"
    check_owner(folder, *kinds, flag=flag, was_ours=was_ours)
    try: _mark(Path(folder), kinds[0])
    except OSError as e:
        raise OSError(f"the folder {folder} cannot be written ({e.strerror}); choose another {flag}") from None


def _mark(folder, kind):
    folder.mkdir(parents=True, exist_ok=True)
    try: file = (folder / MARK).open("x", encoding="utf-8")
    except FileExistsError: return    # marked before, or by another process just now
    with file: json.dump(dict(kind=kind), file)


@contextmanager
def locked(folder, flag="--output_dir"):
    "While the block runs, no other process can lock this marked folder; BlockingIOError if another one has"
    with (Path(folder) / MARK).open("r+") as file:
        try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is at work in {folder}; wait for it, or choose another "
                                  f"{flag}") from None
        except OSError: pass    # a file system without locks
        yield


def _check_place(path):
    "OSError, before any work is done, if no file can be made there"
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{above} is a file, where a folder is needed; choose another name")
    if not os.access(above, os.W_OK): raise PermissionError(f"{above} cannot be written; choose another place")


def check_new_file(path, overwrite=False):
    """FileExistsError if a file is there and may not be replaced, OSError if none can be written there.

    A folder is no place for a file. What is written to devices and pipes replaces nothing."""
    refuse_folder(path)
    if not is_replaceable(path): return
    _check_place(target_of(path))
    if overwrite or not os.path.exists(path): return
    raise FileExistsError(f"{path} exists; choose another name, or replace it with --overwrite")


def _listed(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
