"""One run over several processes (accelerate launch): what each measured -> what one alone would have.

lm-eval deals documents out in turn, the first to process 0, the second to process 1, and strings their lists
together, so that sums and bootstraps would be taken in another order than one process takes them in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

_NOTHING = object()


def as_of_one(gathered: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """Return what lm-eval gathered of all processes in the order of one. gathered: of each process either
    {task: [samples]} or {task: {(metric, filter): [values]}}."""
    merged: dict[Any, Any] = {}
    for key in dict.fromkeys(key for part in gathered for key in part):
        parts = [part[key] for part in gathered if key in part]
        merged[key] = as_of_one(parts) if isinstance(parts[0], Mapping) else _in_turn(parts)
    return merged


def _in_turn(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the documents' rows in order. Samples are listed filter by filter, documents within."""
    filters = dict.fromkeys(_filter_of(row) for part in parts for row in part)
    ordered = []
    for wanted in filters:
        own = [[row for row in part if _filter_of(row) == wanted] for part in parts]
        ordered += [row for turn in zip_longest(*own, fillvalue=_NOTHING) for row in turn]
    return [row for row in ordered if row is not _NOTHING]


def _filter_of(row: Any) -> Any:
    return row.get("filter") if isinstance(row, Mapping) and "doc_id" in row else None
