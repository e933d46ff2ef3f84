"""scripts/quickstart.py removes only its own folders, and says in plain words what came out."""

import json
import math
import re
import time
from pathlib import Path

import pytest

from scripts import quickstart
from torchtitan.tools.errors import UserError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2}, "--steps must be at least 3"),
        ({"ranks": 0}, "--ranks must be at least 1"),
        ({"output": Path(__file__)}, "this is a file"),
    ],
)
def test_wrong_options_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        quickstart.main(quickstart.Options(**{"output": tmp_path / "new", **changes}))


def test_folder_with_anything_else_is_kept(tmp_path):
    """Also the parent of a quickstart's folder."""
    (tmp_path / "quickstart" / "quickstart").mkdir(parents=True)
    (tmp_path / "quickstart" / quickstart.MARK).touch()
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        quickstart.main(quickstart.Options(output=tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert (tmp_path / "quickstart" / quickstart.MARK).exists()


def test_failed_command_ends_it_and_the_folder_can_be_used_again(tmp_path, monkeypatch, capsys):
    ran = []

    def run(title, command, environment, stop_after=None):
        ran.append(title)
        raise UserError("the command above failed with exit code 1.")

    monkeypatch.setattr(quickstart, "run", run)
    for _ in range(2):
        with pytest.raises(UserError, match="exit code 1"):
            quickstart.main(quickstart.Options(output=tmp_path / "new"))
    assert ran == ["1. Turn the speech into codes"] * 2


def test_fewer_gpus_than_ranks_are_left_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        quickstart, "run", lambda title, command, environment, stop_after=None: seen.append(environment)
    )
    monkeypatch.setattr(quickstart, "summarize", lambda *_: None)
    for name in ("read_metrics", "draw_losses"):
        monkeypatch.setattr(quickstart, name, lambda *_: {})
    for gpus, used in ((0, True), (1, False), (2, True)):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        quickstart.main(quickstart.Options(output=tmp_path / "new"))
        assert ("CUDA_VISIBLE_DEVICES" not in seen[-1]) == used


def test_run_shows_output_and_takes_the_exit_code_seriously(capsys):
    quickstart.run("A title", ["python", "-c", "print('said', 7)"], {})
    shown = capsys.readouterr().out
    assert "== A title" in shown and "$ python -c print('said', 7)" in shown and "   said 7" in shown
    with pytest.raises(UserError, match="failed with exit code 3"):
        quickstart.run("", ["python", "-c", "raise SystemExit(3)"], {})
    with pytest.raises(UserError, match="ended without a line like"):
        quickstart.run("", ["python", "-c", "print('no')"], {}, stop_after="yes$")


def test_run_cuts_a_command_off_after_a_line():
    code = "import time; print('step 1', flush=True); print('step 2', flush=True); time.sleep(60)"
    begin = time.monotonic()
    quickstart.run("", ["python", "-c", code], {}, stop_after="step 2$")
    assert time.monotonic() - begin < 50


def test_only_the_last_state_of_a_bar_stays_in_a_file(capsys):
    for line in ("codes:  50%|#####     | 5/10", "codes: 100%|##########| 10/10", "6frame [00:00, 9frame/s]", "words"):
        quickstart.show(line)
    assert capsys.readouterr().out == "   codes: 100%|##########| 10/10\n   words\n"


def test_on_a_terminal_the_states_of_a_bar_replace_each_other(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for line in ("codes:  50%|#####     | 5/10", "codes: 100%|##########| 10/10", "6frame [00:00, 9frame/s]", "words"):
        quickstart.show(line)
    lines = capsys.readouterr().out.split("\n")
    assert [line.count("\r\x1b[K") for line in lines] == [2, 2, 0]
    assert lines[0].endswith("10/10") and lines[1].endswith("words")


def test_summary_says_what_the_figures_mean(tmp_path, capsys):
    tasks = {
        "SALMON": {"speaker_consistency": (0.7, 200), "gender_consistency": (0.65, 200), "rir_consistency": (0.5, 10)},
        "sLM21": {"sBLIMP": (0.9, 200), "sWUGGY": (1.0, 20)},
        "sStoryCloze": {"sStoryCloze": (0.9375, 16)},
    }
    for folder, results in tasks.items():
        place = tmp_path / folder / "hf" / "quickstart"
        place.mkdir(parents=True)
        described = {
            task: {"accuracy": share, "standard_error": math.sqrt(share * (1 - share) / pairs), "pairs": pairs}
            for task, (share, pairs) in results.items()
        }
        (place / "results.json").write_text(json.dumps({"tasks": described}))
    figures = {
        "loss": {1: 9.5, 9: 3.25},
        "validation/loss": {5: 5.0, 9: 4.25},
        "validation/code_entropy": {5: 4.9, 9: 4.9},
    }
    quickstart.summarize(figures, tmp_path, tmp_path / "hf", tmp_path / "output.wav", tmp_path / "loss.png", 200)
    shown = capsys.readouterr().out
    assert "Done in 3.3 minutes" in shown
    assert "9.50 nats a token at step 1, 3.25 at step 9" in shown
    assert "validation loss    4.25" in shown and "4.90" in shown
    assert re.search(
        r"70 ± 3 % +goes on in the same voice, or in another one \(speaker_consistency, 200 pairs\)", shown
    )
    assert re.search(r"65 ± 3 % .*other gender", shown) and re.search(r"90 ± 2 % +counts in order", shown)
    assert "rir_consistency 50 ± 16, sWUGGY 100 ± 0, sStoryCloze 94 ± 6\n" in shown
