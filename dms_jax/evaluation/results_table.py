"""The tables that the command `evaluate` prints: one line per method, with 95% intervals."""

import itertools
from collections.abc import Sequence

from dms_jax.evaluation.result_records import Record
from dms_jax.evaluation.table_kinds import AnswerTable, Line, Table
from dms_jax.evaluation.text_tasks import TEXT_TASKS

ANSWER_TABLE = AnswerTable()


def summary(records: Sequence[Record]) -> list[Line]:
    """Return the lines of the tables of all records, each as a plain mapping."""
    tables = [task.table for task in TEXT_TASKS.values() if task.table is not None]
    return [line for table in [*tables, ANSWER_TABLE] for line in table.lines(records)]


def table(lines: Sequence[Line]) -> str:
    """Format the lines of `summary` as text."""
    out: list[str] = []
    for _, group in itertools.groupby(lines, lambda line: (line["task"], line.get("domain"), line.get("budget"))):
        group = list(group)
        kind = _table_of(group[0]["task"])
        out += [""] * bool(out) + [kind.header(group[0]), *map(kind.row, group), *kind.footer(group)]
    return "\n".join(out)


def _table_of(task: str) -> Table:
    found = TEXT_TASKS[task].table if task in TEXT_TASKS else None
    return found or ANSWER_TABLE
