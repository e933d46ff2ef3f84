"""What the command lines compute is what tests/data/record.json says, to the bit."""

import json
import subprocess
import sys

import pytest

from tests import record


@pytest.mark.slow
def test_results_are_those_of_the_record():
    recorded = json.loads(record.RECORD.read_text())["made_with"]
    if others := record.differences(recorded, record.made_with()):
        pytest.skip(f"the record was made elsewhere: {'; '.join(others)}")
    command = [sys.executable, "tests/record.py", "--check"]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_difference_is_named():
    recorded = {"same": "1", "other": "1", "gone": "1"}
    found = {"same": "1", "other": "2", "more": "1"}
    assert record.differences(recorded, found) == ["other: differs", "gone: is missing", "more: is new"]
    assert record.differences(recorded, recorded) == []


def test_a_digest_changes_with_the_last_bit_of_a_number():
    assert record.digest([0.1, 2.0]) == record.digest([0.1, 2.0])
    assert record.digest([0.1, 2.0]) != record.digest([0.1 + 2**-56, 2.0])


def test_a_record_from_elsewhere_is_not_compared(monkeypatch, tmp_path, capsys):
    elsewhere = {"made_with": {**record.made_with(), "torch": "1.0"}, "digests": {}}
    monkeypatch.setattr(record, "RECORD", tmp_path / "record.json")
    record.RECORD.write_text(json.dumps(elsewhere))
    monkeypatch.setattr(sys, "argv", ["record.py", "--check"])
    assert record.main() == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "torch: differs" in error
