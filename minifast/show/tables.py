"""Plain text tables: aligned columns, numbers to the right."""
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def shown(value: Any) -> str:
    """A cell as people read it: four decimals, or an exponent where those would hide the number.

    >>> [shown(v) for v in (0.5, 4e-7, 1797, "head", None)]
    ['0.5000', '4.000e-07', '1,797', 'head', '']
    """
    if value is None:
        return ""
    if isinstance(value, float):
        has_room = value == 0 or 1e-3 <= abs(value) < 1e5 or value != value
        return f"{value:.4f}" if has_room else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """`rows` under `header`, each column as wide as its widest cell.

    >>> print(table(["name", "lr"], [["body", 1e-3], ["head", 0.01]]))
    name      lr
    body  0.0010
    head  0.0100
    """
    body = [list(row) for row in rows]
    filled = []
    for i, cells in enumerate(zip(header, *body, strict=True)):
        texts = [" ".join(shown(cell).splitlines()) for cell in cells]
        gaps = [" " * (max(map(width, texts)) - width(text)) for text in texts]
        is_text = all(isinstance(row[i], str) for row in body)
        filled.append([text + gap if is_text else gap + text for text, gap in zip(texts, gaps, strict=True)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*filled, strict=True))


def width(text: str) -> int:
    """In columns of a terminal: letters of East Asia and most emoji take two, combining marks none.

    >>> [width(text) for text in ("cat", "\u732b", "e\u0301")]
    [3, 2, 1]
    """
    return sum(0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
               for letter in text)


class Table(list[dict[str, Any]]):
    """A list of rows (dicts with the same keys) that prints as an aligned table.

    >>> Table([{"epoch": 0, "lr": 0.004}, {"epoch": 1, "lr": 0.1}])
    epoch      lr
        0  0.0040
        1  0.1000
    """

    def __repr__(self) -> str:
        return table(list(self[0]), [list(row.values()) for row in self]) if self else "(no rows)"


def listed(names: Iterable[Any], n: int = 5) -> str:
    """The first `n` of `names`, and how many more there are.

    >>> listed(range(7))
    '0, 1, 2, 3, 4 and 2 more'
    """
    texts = list(map(str, names))
    return ", ".join(texts[:n]) + (f" and {len(texts) - n} more" if len(texts) > n else "")


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys of all rows, in the order of their first appearance.

    >>> columns([{"epoch": 0}, {"epoch": 1, "valid_loss": 0.1}])
    ['epoch', 'valid_loss']
    """
    return list(dict.fromkeys(key for row in rows for key in row))
