"""One table model with three renderers: HTML (macros.html), Markdown and a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Generic, NamedTuple, TypeVar

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from collegium.console import printable
from collegium.report.formats import fixed

R = TypeVar("R")
MAX_UNWRAPPED = 10
"""Longest cell in a terminal that is never wrapped."""
# A page is 1,024 pixels wide, a name at least 210, and a character of a table about 7.6.
PAGE_WIDTH, MAX_HEADING, COLUMN_GAP = 104, 20, 3
"""Characters: of all columns beside the names, of a heading at most, and between columns."""


class Cell(NamedTuple):
    """A formatted value, and whether it is the best of its column."""

    text: str
    is_best: bool


@dataclass(frozen=True)
class Column(Generic[R]):
    """A column: reads a value of a row and formats it. The value of lowest `rank` is the best."""

    title: str
    read: str | Callable[[R], Any]
    """An attribute of the row, or a function."""
    write: Callable[[Any], str] = fixed
    rank: Callable[[Any], float] | None = None
    is_text: bool = False
    short: str | None = ""
    """Heading in a terminal, the title if empty. None omits the column there."""

    def value(self, row: R) -> Any:
        """Return the value of a row, None if it has none."""
        return getattr(row, self.read) if isinstance(self.read, str) else self.read(row)

    def best(self, rows: Sequence[R]) -> str | None:
        """Return the text of the best value, None unless at least two rows have one."""
        values = [value for row in rows if (value := self.value(row)) is not None]
        if self.rank is None or len(values) < 2:
            return None
        return self.write(min(values, key=self.rank))


@dataclass(frozen=True)
class Line(Generic[R]):
    """A row with its name and color. `group` is a heading above it."""

    name: str
    row: R
    color: str = ""
    group: str = ""
    is_marked: bool = False
    competes: bool = True
    """Whether its values may be the best of their columns."""


@dataclass(frozen=True)
class Table(Generic[R]):
    """A table with names in the first column."""

    title: str
    first: str
    columns: Sequence[Column[R]]
    lines: Sequence[Line[R]]

    def rows(self) -> Iterator[tuple[Line[R], list[Cell]]]:
        """Yield each line with its cells."""
        competing = [line.row for line in self.lines if line.competes]
        best = [column.best(competing) for column in self.columns]
        for line in self.lines:
            texts = [column.write(column.value(line.row)) for column in self.columns]
            # Compared as text: two values that look the same are both the best.
            pairs = zip(texts, best, strict=True)
            yield line, [Cell(text, line.competes and text == top) for text, top in pairs]

    def parts(self) -> list[Table[R]]:
        """Split the columns into tables that fit the width of a page, the names in each."""
        rows = [cells for _, cells in self.rows()]
        parts: list[list[Column[R]]] = [[]]
        room = PAGE_WIDTH
        for i, column in enumerate(self.columns):
            # Headings wrap at spaces and hyphens, cells of numbers do not wrap.
            words = column.title.replace("-", " ").split()
            texts = [] if column.is_text else [cells[i].text for cells in rows]
            heading = min(MAX_HEADING, max(map(len, words), default=0))
            width = COLUMN_GAP + max([heading, *map(len, texts)])
            if width > room and parts[-1]:
                parts.append([])
                room = PAGE_WIDTH
            parts[-1].append(column)
            room -= width
        return [replace(self, columns=columns) for columns in parts]

    def markdown(self) -> str:
        """Render as Markdown without the title, with the best of each column in bold."""
        lines = [[self.first, *(column.title for column in self.columns)]]
        lines.append(["---", *("---" if c.is_text else "---:" for c in self.columns)])
        for line, cells in self.rows():
            texts = [f"**{cell.text}**" if cell.is_best else cell.text for cell in cells]
            lines.append([line.name, *texts])
        # A bar in a name would split its cell.
        escaped = [[text.replace("|", "\\|") for text in line] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)

    def rich(self) -> RichTable:
        """Render for a terminal, with the best of each column and the marked names in bold."""
        table = RichTable(title=printable(self.title), title_justify="left", box=box.SIMPLE_HEAD)
        table.collapse_padding, table.pad_edge = True, False
        table.add_column(_text(self.first))
        shown = [column.short is not None for column in self.columns]
        rows = list(self.rows())
        for i, column in compress(enumerate(self.columns), shown):
            # Long cells may wrap: rich cuts names to nothing before it cuts other cells.
            is_short = all(len(cells[i].text) <= MAX_UNWRAPPED for _, cells in rows)
            justify = "left" if column.is_text else "right"
            # Text: a name such as `[red]a` must not be read as rich markup.
            table.add_column(_text(column.short or column.title), justify=justify, no_wrap=is_short)
        for line, cells in rows:
            if line.group:
                table.add_section()
                table.add_row(_text(line.group, style="dim"))
            texts = [_text(c.text, "bold" if c.is_best else "") for c in compress(cells, shown)]
            table.add_row(_text(line.name, "bold" if line.is_marked else ""), *texts)
        return table


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style)
