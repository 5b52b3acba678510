"""Tables that grow in their files, against what pandas and MLflow read."""

from __future__ import annotations

import contextlib
import json
import math
import resource

import numpy as np
import pandas as pd
import pytest

from lightning_lbgm.callbacks.table import JsonTable, append_csv

ROWS = [{"round": t, "name": f'client "{t}"', "loss": t / 3 if t % 2 else math.nan} for t in range(6)]


def read(path):
    return pd.read_json(path, orient="split")


@pytest.fixture
def table(tmp_path):
    return JsonTable(tmp_path / "deep" / "t.json", list(ROWS[0]))


def assert_holds(path, rows):
    found = read(path)
    assert list(found) == list(rows[0])
    assert found["round"].tolist() == [row["round"] for row in rows]
    assert found["name"].tolist() == [row["name"] for row in rows]
    np.testing.assert_allclose(found["loss"].astype(float), [row["loss"] for row in rows])


def test_it_is_whole_after_each_call(table):
    for t in range(1, 6):
        table.append(ROWS[t - 1 : t])
        assert_holds(table.path, ROWS[:t])


def test_what_is_not_finite_is_empty(table):
    table.append([{"round": 0, "name": "a", "loss": math.inf}])
    assert json.loads(table.path.read_text())["data"] == [[0, "a", None]]


def test_it_can_be_copied_while_it_grows(table, tmp_path):
    table.append(ROWS[:2])
    table.copy_to(tmp_path / "copy.json")
    table.append(ROWS[2:])
    assert_holds(tmp_path / "copy.json", ROWS[:2])
    assert_holds(table.path, ROWS)


def test_one_that_is_there_goes_on_growing(table):
    table.append(ROWS[:2])
    JsonTable(table.path, list(ROWS[0])).append(ROWS[2:])
    assert_holds(table.path, ROWS)


@pytest.mark.parametrize("text", ["", "{", '{"columns":["other"],"data":[[1]]}', '{"columns":["round","name","loss"]'])
def test_a_file_of_another_kind_is_replaced(table, text):
    table.path.parent.mkdir()
    table.path.write_text(text)
    again = JsonTable(table.path, list(ROWS[0]))
    again.append(ROWS)
    assert_holds(again.path, ROWS)


def other_table(path, rows, order=("round", "name", "loss")):
    pd.DataFrame(rows)[list(order)].to_json(path, orient="split", index=False)
    return path


@pytest.mark.parametrize("order", [("round", "name", "loss"), ("loss", "round", "name")], ids=str)
def test_rows_that_are_stored_come_before(table, tmp_path, order):
    table.append(ROWS[4:])
    table.put_before(other_table(tmp_path / "stored.json", ROWS[:4], order))
    assert_holds(table.path, ROWS)
    JsonTable(table.path, list(ROWS[0])).append(ROWS)
    assert_holds(table.path, ROWS + ROWS)


@pytest.mark.parametrize(("here", "stored"), [(2, 1), (1, 3)], ids=["more here", "more stored"])
def test_of_two_earlier_tables_the_longer_one_counts(table, tmp_path, here, stored):
    """A run was killed and left rows here; the store has those of its last minute, or of a resumed run elsewhere."""
    table.append(ROWS[:here])
    again = JsonTable(table.path, list(ROWS[0]))
    again.append(ROWS[4:])
    again.put_before(other_table(tmp_path / "stored.json", ROWS[:stored]))
    assert_holds(table.path, ROWS[: max(here, stored)] + ROWS[4:])


@contextlib.contextmanager
def files_of_at_most(size):
    """Let the system refuse to write more, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_table_as_it_was(table):
    table.append(ROWS[:2])
    with files_of_at_most(table.path.stat().st_size + 10), pytest.raises(OSError, match="too large"):
        table.append(ROWS[2:])
    assert_holds(table.path, ROWS[:2])
    table.append(ROWS[2:])
    assert_holds(table.path, ROWS)


def test_rows_are_added_without_looking_at_those_that_are_there(table):
    """The bytes in the middle are not touched: a hole in them, which takes no space on the disk, stays one."""
    table.append(ROWS[:1])
    size = 1 << 40
    with table.path.open("r+b") as file:
        file.seek(size)
        file.write(b"]}")
    table.append(ROWS[1:])
    assert size < table.path.stat().st_size < size + 1000
    assert table.path.stat().st_blocks * 512 < 1 << 20


def test_csv_has_one_header_and_starts_anew(tmp_path):
    path = tmp_path / "deep" / "t.csv"
    append_csv(path, ROWS[:2])
    append_csv(path, ROWS[2:])
    assert pd.read_csv(path)["round"].tolist() == [0, 1, 2, 3, 4, 5]
    append_csv(path, ROWS[:1], starts=True)
    assert pd.read_csv(path)["round"].tolist() == [0]
