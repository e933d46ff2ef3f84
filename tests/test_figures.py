"""The figures of the README: each is made from small inputs, says what it promises, and is the same when made again."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from scripts.draw_figures import Options, main
from scripts.figures.architecture import FRAMES, HEARD
from scripts.figures.style import WIDTH
from torchtitan.audio.spectrogram import draw_spectrogram
from torchtitan.tools.errors import UserError, run_command
from torchtitan.tools.plots import THEMES, draw_losses, read_metrics

ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"
PROMPT_SECONDS, SECONDS = 1.0, 2.5  # 1.0 s is 12.5 frames: the prompt ends with its 13th, at 1.04 s
BARS = [("Loader", "packed", 4.0), ("Loader", "as it is", 2.0), ("Evaluation", "a & b < c", 0.5)]


def sound(seconds: float, seed: int) -> np.ndarray:
    """Noise, quiet and loud in turn, [seconds * 24000]."""
    time = np.arange(round(seconds * 24_000)) / 24_000
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return 0.1 * noise * (1 + np.sin(2 * np.pi * 3 * time))


@pytest.fixture
def options(tmp_path) -> Options:
    """Small inputs of every figure."""
    soundfile.write(tmp_path / "prompt.wav", sound(PROMPT_SECONDS, 0), 24_000)
    soundfile.write(tmp_path / "output.wav", sound(SECONDS, 1), 24_000)
    steps = [{"step": step, "loss": 9 / math.sqrt(step)} for step in (1, 10, 20, 30)]
    judged = [{"step": step, "validation/loss": 5.0, "validation/code_entropy": 4.4} for step in (10, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps + judged))
    entries = [dict(zip(("group", "label", "ratio"), bar, strict=True)) for bar in BARS]
    results = {"machine": "an abacus", "software": "beads 1.0", "note": "wood", "results": entries}
    (tmp_path / "results.json").write_text(json.dumps(results))
    return Options(
        output=tmp_path / "figures",
        run=tmp_path,
        continuation=tmp_path / "output.wav",
        prompt=tmp_path / "prompt.wav",
        results=tmp_path / "results.json",
    )


def draw(options: Options, *names) -> dict[str, Path]:
    """The figures by ``name-page``, after drawing those of these names."""
    options.only = names
    assert main(options) == 0
    return {path.stem: path for path in options.output.iterdir()}


def words(path: Path) -> list[str]:
    """All texts of an SVG."""
    return ["".join(element.itertext()) for element in ElementTree.parse(path).iter(f"{SVG}text")]


def test_all_figures_are_drawn_for_both_pages_and_the_same_twice(options, capsys):
    assert main(options) == 0
    first = {path.name: path.read_bytes() for path in options.output.iterdir()}
    svgs = {f"{name}-{page}.svg" for name in ("architecture", "training-curve", "benchmarks") for page in THEMES}
    assert set(first) == svgs | {f"continuation-{page}.png" for page in THEMES}
    assert len(capsys.readouterr().out.splitlines()) == len(first)
    for name in svgs:
        root = ElementTree.fromstring(first[name])
        assert root.tag == f"{SVG}svg"
        assert len(first[name]) < 60_000
        colors = [THEMES[page].text in first[name].decode() for page in ("light", "dark")]
        assert colors == ["-light" in name, "-dark" in name], name
    assert main(options) == 0
    assert {path.name: path.read_bytes() for path in options.output.iterdir()} == first


def test_architecture_shows_the_token_stream_and_this_prompt(options):
    path = draw(options, "architecture")["architecture-light"]
    texts = words(path)
    for text in ("Mimi encoder", "Llama 3", "Mimi decoder", "BOS", "<audio>", "semantic", "acoustic"):
        assert text in texts
    stream = texts[texts.index("<audio>") + 1 :]
    assert stream[:4] == [f"<{code}_{quantizer}>" for quantizer, code in enumerate(HEARD[0])]
    assert f"frame {FRAMES + 1}" in texts
    before = path.read_text()
    soundfile.write(options.prompt, sound(PROMPT_SECONDS, 5), 24_000)
    after = draw(options, "architecture")["architecture-light"].read_text()
    changed = [line for line in before.splitlines() if line not in after.splitlines()]
    assert len(changed) == 2 and all(line.startswith("<path") for line in changed)  # the two waveforms


def test_no_word_of_a_drawing_is_outside_of_it(options):
    figures = draw(options, "architecture", "benchmarks")
    for page in THEMES:
        for name in ("architecture", "benchmarks"):
            root = ElementTree.parse(figures[f"{name}-{page}"]).getroot()
            for element in root.iter(f"{SVG}text"):
                # Letters of the usual fonts are narrower than 0.6 of their size on average.
                length = 0.6 * float(element.attrib["font-size"]) * len(element.text or "")
                start = (
                    float(element.attrib["x"])
                    - length * {"start": 0, "middle": 0.5, "end": 1}[element.attrib["text-anchor"]]
                )
                assert start >= 0 and start + length <= WIDTH, element.text
                assert 0 < float(element.attrib["y"]) < float(root.attrib["height"]) - 2, element.text


def test_training_curve_names_its_lines(options):
    texts = words(draw(options, "training-curve")["training-curve-dark"])
    for text in ("training", "validation", "entropy of the validation codes", "step", "loss (nats a token)"):
        assert text in texts


def test_training_curve_of_a_run_without_validation(options):
    (options.run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    texts = words(draw(options, "training-curve")["training-curve-light"])
    assert "training" in texts and "validation" not in texts


def test_loss_curve_of_the_quickstart_is_a_png(options, tmp_path):
    draw_losses(read_metrics(options.run / "metrics.jsonl"), tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10  # something is drawn


def test_metrics_of_a_step_that_was_run_twice_are_the_later_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 3.0}\n{"step": 3, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n')
    assert read_metrics(path) == {"loss": {2: 2.0, 3: 2.5}}
    path.write_text('{"step": 2, "loss": 3.0}\n{"step": 3, "lo')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 does not contain"):
        read_metrics(path)


@pytest.mark.parametrize("page", THEMES)
def test_continuation_has_its_line_where_the_prompt_ends(options, page):
    with Image.open(draw(options, "continuation")[f"continuation-{page}"]) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGBA")).astype(int)
    assert options.output.joinpath(f"continuation-{page}.png").stat().st_size < 120_000
    green = (pixels[..., 1] > pixels[..., 0] + 30) & (pixels[..., 1] > pixels[..., 2] + 30)
    lines = np.flatnonzero(green.mean(axis=0) > 0.6)
    assert len(lines) and lines[-1] - lines[0] < 6
    # The spectrogram is the longest opaque part of a row in its middle.
    opaque = np.flatnonzero(np.diff(np.concatenate(([0], pixels[pixels.shape[0] // 2, :, 3] > 200, [0])).astype(int)))
    left, right = max(zip(opaque[::2], opaque[1::2], strict=True), key=lambda ends: ends[1] - ends[0])
    assert right - left > 0.7 * pixels.shape[1]
    assert (lines.mean() - left) / (right - left) == pytest.approx(1.04 / SECONDS, abs=0.004)


def test_spectrogram_keeps_its_look_for_inference(tmp_path):
    draw_spectrogram(tmp_path / "a.png", torch.from_numpy(sound(1.0, 0)).float(), 12_000)
    with Image.open(tmp_path / "a.png") as image:
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_benchmarks_has_a_bar_an_entry_on_the_right_side_of_1(options):
    path = draw(options, "benchmarks")["benchmarks-dark"]
    bars = [element.attrib for element in ElementTree.parse(path).iter(f"{SVG}rect") if element.get("class") == "bar"]
    assert len(bars) == len(BARS)
    (four, two, half) = [(float(bar["x"]), float(bar["width"])) for bar in bars]
    assert four[0] == two[0] == pytest.approx(half[0] + half[1], abs=0.2)  # the line at 1
    assert four[1] == pytest.approx(2 * two[1], abs=0.2) and half[1] == pytest.approx(two[1], abs=0.2)  # logarithmic
    texts = words(path)
    for text in ("4×", "2×", "0.5×", "an abacus, beads 1.0", "a & b < c", "wood"):
        assert any(text in found for found in texts), text
    assert texts.count("Loader") == 1


def test_each_ratio_of_the_repository_stands_in_its_table():
    sections = dict(
        re.findall(r"^## (\w+\.py):[^\n]*\n(.*?)(?=^## |\Z)", (ROOT / "benchmarks/README.md").read_text(), re.M | re.S)
    )
    results = json.loads((ROOT / "benchmarks/results.json").read_text())["results"]
    assert len(results) >= 8
    for entry in results:
        script = re.search(r"benchmarks/(\w+\.py)", entry["command"])
        assert script and entry["plain"]
        rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in sections[script[1]].splitlines()]
        cells = {cell for row in rows if row[0] == entry["row"] for cell in row[1:]}
        numbers = {float(cell) for cell in cells if re.fullmatch(r"[\d.]+", cell)}
        assert entry["ratio"] in numbers, entry["label"]


def test_figures_of_the_repository_are_those_of_its_inputs(tmp_path):
    made = Options(tmp_path, prompt=ROOT / "assets/prompt.flac", results=ROOT / "benchmarks/results.json")
    for path in draw(made, "architecture", "benchmarks").values():
        stored = ROOT / "assets" / "figures" / path.name
        assert path.read_bytes() == stored.read_bytes(), f"{stored}: run scripts/draw_figures.py again"


@pytest.mark.parametrize(
    ("name", "missing", "sentence"),
    [
        ("architecture", "prompt.wav", "there is no such file"),
        ("training-curve", "metrics.jsonl", "scripts/quickstart.py makes one"),
        ("continuation", "output.wav", "scripts/quickstart.py makes one, and inference.py"),
        ("continuation", "prompt.wav", "there is no such file"),
        ("benchmarks", "results.json", "benchmarks/results.json is one"),
    ],
)
def test_missing_input_is_named_and_the_others_are_drawn(options, capsys, name, missing, sentence):
    (options.output.parent / missing).unlink()
    other = "benchmarks" if name == "architecture" else "architecture"
    options.only = (name,) if missing == "prompt.wav" and name != "architecture" else (name, other)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: main(options))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {name} was not drawn: ") and missing in line and sentence in line
    assert line.endswith(".")
    assert {path.stem.rsplit("-", 1)[0] for path in options.output.iterdir()} == set(options.only) - {name}


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("results.json", "[]", "not a file of results"),
        ("results.json", '{"machine": "a", "software": "b", "note": "", "results": []}', "results are needed"),
        ("metrics.jsonl", "nothing", "line 1 does not contain the figures of a step"),
        ("metrics.jsonl", '{"step": 1, "lr": 0.1}', "it holds no loss"),
        ("output.wav", "noise", "not a readable audio file"),
    ],
)
def test_unusable_input_is_one_sentence(options, capsys, file, content, sentence):
    (options.output.parent / file).write_text(content)
    figure = {"results.json": "benchmarks", "metrics.jsonl": "training-curve", "output.wav": "continuation"}[file]
    options.only = (figure,)
    assert main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert file in line and sentence in line


def test_nothing_after_the_prompt_is_refused(options, capsys):
    soundfile.write(options.continuation, sound(1.04, 1), 24_000)
    options.only = ("continuation",)
    assert main(options) == 2
    assert "nothing follows the 1.04 s of the prompt" in capsys.readouterr().err


def test_a_silent_prompt_is_refused(options, capsys):
    soundfile.write(options.prompt, np.zeros(24_000), 24_000)
    options.only = ("architecture",)
    assert main(options) == 2
    assert "the prompt is silent" in capsys.readouterr().err


def test_command_line(options):
    command = [sys.executable, "scripts/draw_figures.py", "--only", "benchmarks", "--output", str(options.output)]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in options.output.iterdir()) == ["benchmarks-dark.svg", "benchmarks-light.svg"]


# Results of a GPU


def gpu_results(folder: Path, **changes) -> Path:
    """A folder as benchmarks/gpu.py writes it, with two comparisons and a case that failed."""
    on = {"device": "NVIDIA H200", "torch": "2.11.0", "transformers": "5.17.0", "smoke": False, **changes}
    on["date"] = "2026-11-27T10:00:00+00:00"
    step = {"real_tokens_per_second": 20_000.0, "mfu_positions": 0.25, "rows": 32}
    ours = {**step, "real_tokens_per_second": 50_000.0, "mfu_positions": 0.523}
    training = {"plain compiled": {"figures": step}, "ours packed compiled": {"figures": ours}}
    generation = {"1 row": {"figures": {"ids_per_second": 770.0, "share": 0.35, "ratio": 4.8}}}
    folder.mkdir(exist_ok=True)
    for part, cases in (("training", training), ("generation", generation)):
        content = {"part": part, "cases": {name: {"ok": True, **case, "on": on} for name, case in cases.items()}}
        content["cases"]["8 rows"] = {"ok": False, "error": "it was ended after 100 s", "on": on}
        (folder / f"{part}.json").write_text(json.dumps(content))
    return folder


def test_results_of_a_gpu_say_the_card_the_versions_and_the_date(options, tmp_path):
    options.gpu = gpu_results(tmp_path / "gpu")
    said = words(draw(options, "gpu")["gpu-light"])
    facts = ("NVIDIA H200", "torch 2.11.0", "transformers 5.17.0", "2026-11-27")
    assert any(all(fact in text for fact in facts) for text in said)
    for text in ("packed compiled: 50,000 tokens/s, 52 % MFU", "2.5×", "1 row: 770 ids/s, 35 % of the bound", "4.8×"):
        assert text in said
    assert not any("8 rows" in text for text in said)


def test_results_of_two_cards_are_not_drawn_as_one(options, tmp_path, capsys):
    options.gpu, options.only = gpu_results(tmp_path / "gpu"), ("gpu",)
    other = json.loads((gpu_results(tmp_path / "other", device="NVIDIA H100") / "generation.json").read_text())
    (options.gpu / "generation.json").write_text(json.dumps(other))
    assert main(options) == 2
    assert "of several machines or versions" in capsys.readouterr().err
    for content, sentence in (("[]", "not a file of benchmarks/gpu.py"), ('{"part": "x", "cases": {}}', "no results")):
        for file in options.gpu.iterdir():
            file.write_text(content)
        assert main(options) == 2
        assert sentence in capsys.readouterr().err
