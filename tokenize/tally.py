"""What all units together have done so far, whether too much of it is bad, and whether every record is accounted for.

Pure: from the units' records alone.
"""

import dataclasses
from collections.abc import Iterable

from orchestrator.errors import DataError
from orchestrator.tokenize.work_folder import UnitRecord

BAD_CHECKED_FROM = 10_000  # records, while it is running; at the end always


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tally:
    """Sums over units. `records == documents + held_out + empty + quarantined`."""

    units_done: int = 0
    source_bytes: int = 0
    records: int = 0
    documents: int = 0
    held_out: int = 0
    empty: int = 0
    quarantined: int = 0
    tokens: int = 0
    """Of documents and those held out."""
    first_bad: tuple[str, ...] = ()
    """Up to three, in the order of the units."""


def add_up(records: Iterable[UnitRecord]) -> Tally:
    """Sum up records, which are in the order of their units."""
    total = Tally()
    first_bad: list[str] = []
    sums = dict.fromkeys((field.name for field in dataclasses.fields(total) if field.name != "first_bad"), 0)
    for record in records:
        sums["units_done"] += record.state == "done"
        sums["source_bytes"] += record.source_bytes
        sums["records"] += record.records
        sums["documents"] += record.training.documents
        sums["held_out"] += record.validation.documents
        sums["empty"] += record.empty
        sums["quarantined"] += record.quarantined
        sums["tokens"] += record.training.tokens + record.validation.tokens
        first_bad += record.first_bad[: 3 - len(first_bad)]
    return dataclasses.replace(total, first_bad=tuple(first_bad), **sums)


def refuse_too_many_bad(tally: Tally, max_bad: float, *, at_end: bool) -> None:
    """Stop where more of the records are bad than was allowed.

    Raises:
        DataError: they are.
    """
    is_checked = at_end or tally.records >= BAD_CHECKED_FROM
    if is_checked and tally.quarantined > max_bad * tally.records:
        share = tally.quarantined / tally.records
        raise DataError(
            f"{tally.quarantined:,} of {tally.records:,} records ({share:.2g}) cannot be read, more than --max-bad "
            f"{max_bad:g}; mend them and start anew, or give the same command with a larger --max-bad, which goes on; "
            "the first:",
            tally.first_bad,
        )


def refuse_nothing(tally: Tally, validation_every: int | None) -> None:
    """Account for every record, and refuse a data set without a document: megatron-core cannot open it.

    Raises:
        DataError: no document has text, or none is held out.
    """
    written = tally.documents + tally.held_out
    if tally.records != written + tally.empty + tally.quarantined:
        raise AssertionError(
            f"{tally.records} records read, but {written} documents written, {tally.empty} empty and "
            f"{tally.quarantined} quarantined; this is a fault of orchestrator.tokenize"
        )
    if not written:
        raise DataError(
            f"no document has text: {tally.records} read, {tally.empty} empty, {tally.quarantined} unreadable; "
            "nothing was kept",
            tally.first_bad,
        )
    if validation_every is not None and not (tally.held_out and tally.documents):
        rest = "validate on" if not tally.held_out else "train on"
        raise DataError(
            f"holding out one document in {validation_every} leaves none to {rest}, since only {written} have text; "
            "use another --validation-every; nothing was kept"
        )
