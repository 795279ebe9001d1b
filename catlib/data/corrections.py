"""What a person has decided about labels: read from suspects.csv, recorded in corrections.csv, applied by the next split."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from catlib.breeds import find
from catlib.data.findings import Finding
from catlib.data.sheets import read_sheet
from catlib.errors import InputError
from catlib.files import csv_text, write_text

SUSPECTS, CORRECTIONS, SIMILAR = "suspects.csv", "corrections.csv", "similar.csv"  # beside the split
COLUMNS = (
    "sha256",
    "image",
    "breed",
    "action",
    "to",
)  # of corrections.csv; a photo is known by its bytes, else its path
ACTIONS = ("keep", "relabel", "drop")
RELABELLED = "relabelled (was"  # how the remark on such a photo begins
Corrections = Mapping[str, Mapping[str, str]]  # SHA-256, or path where that is empty → row


def read_corrections(folder: Path) -> Corrections:
    """The decisions of both files; an edited suspects.csv outranks what was recorded earlier. A row without an action
    is undecided; `relabel` takes the breed in `to`, or the likely one where that is empty. Raises InputError naming
    file and line."""
    decided: dict[str, dict[str, str]] = {}
    columns = {column: (column,) for column in (*COLUMNS, "likely")}
    for path in filter(Path.is_file, (folder / CORRECTIONS, folder / SUSPECTS)):
        for line, cells in enumerate(read_sheet(path, columns, ("sha256", "image")), start=2):
            row = dict.fromkeys(columns, "") | {column: cell.removeprefix("'") for column, cell in cells.items()}
            action, to = row["action"].casefold(), ""
            if action and action not in ACTIONS:
                raise InputError(f"{path}:{line}: action {action!r} is none of {', '.join(ACTIONS)}")
            if action == "relabel" and not (to := row["to"] or row["likely"]):
                raise InputError(f"{path}:{line}: relabel needs a breed in the column 'to'")
            if action:
                known, row = find(to), {column: row[column] for column in COLUMNS}
                decided[row["sha256"] or row["image"]] = row | {"action": action, "to": known.name if known else to}
    return decided


def apply_corrections(
    findings: Sequence[Finding], corrections: Corrections, breeds: Collection[str]
) -> tuple[list[Finding], list[str]]:
    """The findings with the labels as decided, and what is to be said of it. Raises InputError on a breed that is none of `breeds`."""
    done, used, seen = [], Counter[str](), set()
    for finding in findings:
        key = next((key for key in (finding.sha256, finding.image, finding.name) if key and key in corrections), "")
        if key and finding.kept:
            action, to = corrections[key]["action"], corrections[key]["to"]
            seen.add(key)
            used[action] += 1
            if action == "drop":
                finding = replace(finding, verdict="dropped", detail=f"as {CORRECTIONS} says")
            elif action == "relabel" and to not in breeds:
                here = f"none of the breeds {', '.join(sorted(breeds))}"
                raise InputError(f"{CORRECTIONS}: {finding.image}: {to!r} is {here}")
            elif action == "relabel":
                remarks = ", ".join(filter(None, (finding.remarks, f"{RELABELLED} {finding.breed})")))
                finding = replace(finding, breed=to, remarks=remarks)
        done.append(finding)
    said = [f"corrections: {', '.join(f'{action} {used[action]:,}' for action in ACTIONS)} photos"] * bool(used)
    if gone := len(corrections.keys() - seen):
        said.append(f"{gone:,} photos of {CORRECTIONS} are not here (their bytes have changed, or they are left out)")
    return done, said


def write_corrections(folder: Path, corrections: Corrections) -> None:
    """Write corrections.csv, where there is any."""
    rows = sorted(corrections.values(), key=lambda row: (row["image"], row["sha256"]))
    if rows:
        write_text(folder / CORRECTIONS, csv_text(COLUMNS, ([row[column] for column in COLUMNS] for row in rows)))


def write_suspects(folder: Path, suspects: pd.DataFrame, similar: pd.DataFrame) -> Path:
    """Write suspects.csv, with empty columns to fill in, and similar.csv. What was decided earlier is recorded and not asked again."""
    write_corrections(folder, decided := read_corrections(folder))
    undecided = suspects[~suspects["sha256"].isin(list(decided))]
    table = undecided.assign(action="", to="")[["action", "to", *undecided.columns]]
    for name, frame in ((SUSPECTS, table), (SIMILAR, similar)):
        write_text(folder / name, csv_text(frame.columns.tolist(), frame.to_numpy(dtype=object).tolist()))
    return folder / SUSPECTS
