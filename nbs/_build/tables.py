"""Cells of tables get classes for the style: `number` in columns of numbers, `short` where a line must not break."""
import re
from html import unescape

SHORT = 28    # characters
CELL = re.compile(r"<(t[dh])\b([^>]*)>(.*?)</\1>", re.DOTALL)
NUMBER = re.compile(r"[-+−±~<]?\s*\d[\d,.]*(?:e[-+]?\d+)?(?:\s?(?:%|M|k|×|°|ms|s|GB|MB))?", re.IGNORECASE)
EMPTY = {"", "nan", "none", "-", "–", "—", "…", "..."}


def words(cell):
    "What a reader sees of a cell"
    return " ".join(unescape(re.sub(r"<[^>]+>", "", cell)).split())


def is_number(text):
    "A number, alone or with what belongs to it: a unit, ± another number, an interval, a p value"
    rest = NUMBER.sub("", text)
    return bool(NUMBER.match(text.lstrip("[("))) and not re.sub(r"±|\+/-|\bp\b|[\[\](),;%…/=\s]|\bto\b", "", rest)


def mark(table): # HTML of one table
    "The table with its classes; columns are counted from the right, because a cell that spans rows stands at the left"
    rows = re.split(r"(?=<tr\b)", table)
    cells = [CELL.findall(row) for row in rows]
    body = [[(tag, words(text)) for tag, _, text in row] for row in cells if any(tag == "td" for tag, _, _ in row)]
    width = min((len(row) for row in body), default=0)
    columns = [[row[-i][1] for row in body] for i in range(1, width + 1)]
    numeric = {i for i, column in enumerate(columns, 1) if is_numeric(column)}

    def change(row):
        n = len(CELL.findall(row))
        position = iter(range(n, 0, -1))      # from the right

        def cell(match):
            tag, attributes, text = match.groups()
            classes = ["number"] if next(position) in numeric else ["short"] if len(words(text)) <= SHORT else []
            return f"<{tag}{with_classes(attributes, classes)}>{text}</{tag}>"
        return CELL.sub(cell, row)
    return "".join(map(change, rows))


def is_numeric(column):
    "Are all cells of a column numbers or empty, and some of them numbers?"
    filled = [text for text in column if text.lower() not in EMPTY]
    return bool(filled) and all(map(is_number, filled))


def with_classes(attributes, classes):
    "Attributes of a tag, with more classes; none of pandas' own alignment"
    attributes = re.sub(r'\s*style="text-align: ?\w+;?"', "", attributes)
    if not classes: return attributes
    if 'class="' in attributes: return attributes.replace('class="', f'class="{" ".join(classes)} ', 1)
    return f'{attributes} class="{" ".join(classes)}"'


def mark_all(html):
    "A page with every table marked; pandas' own style of a table is left out"
    html = re.sub(r"<style scoped>\s*\.dataframe.*?</style>", "", html, flags=re.DOTALL)
    html = re.sub(r'(<tr)\s+style="text-align: ?\w+;"', r"\1", html)
    return re.sub(r"<table\b.*?</table>", lambda match: mark(match.group(0)), html, flags=re.DOTALL)
