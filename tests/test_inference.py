"""Continuing a prompt: whole frames by construction, bounds, seeds, and the command line around them."""

import contextlib
import functools
import http.server
import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from torchtitan.audio.codec import FRAME_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE, load_audio
from torchtitan.generation import Sampling, continue_codes, frame_bound, sample_requests
from torchtitan.tools.errors import UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
HOT = Sampling(temperature=2.0, top_k=None)


def import_script(name: str):
    """A script of the repository's root as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


inference = import_script("inference")


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> Path:
    """0.9 s of noise at 16 kHz."""
    path = tmp_path_factory.mktemp("prompt") / "prompt.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(14_400), 16_000)
    return path


# Bounds


def test_default_bound_is_1024_ids(load):
    assert [frame_bound(load(q)) for q in (1, 4, 8)] == [1021, 255, 127]


def test_bound_in_seconds(lm):
    assert frame_bound(lm, 0.08) == 1
    assert frame_bound(lm, 20.4) == 255
    assert frame_bound(lm, 20.47) == 255
    for seconds in (0.0, -1.0, 0.07, math.nan, math.inf):
        with pytest.raises(UserError, match="max_seconds"):
            frame_bound(lm, seconds)
    with pytest.raises(UserError, match=r"40\.88 s"):
        frame_bound(lm, 60.0)


def test_a_short_context_bounds_too(lm, random_codes):
    lm.model.config.max_position_embeddings = 100
    assert frame_bound(lm) == 24
    (result,) = continue_codes(lm, random_codes(4, 4), sampling=HOT)
    assert result.codes.shape[1] == 20
    with pytest.raises(UserError, match="context"):
        continue_codes(lm, random_codes(4, 4), max_frames=25)


@pytest.mark.parametrize("new_frames", [1, 2, 9])
def test_bound_is_met_exactly(lm, random_codes, new_frames):
    ticks = []
    (result,) = continue_codes(lm, random_codes(4, 3), 3 + new_frames, HOT, on_frame=lambda: ticks.append(1))
    assert result.codes.shape == (4, new_frames)
    assert not result.ended
    assert len(ticks) == new_frames


def test_prompt_without_room_is_refused(lm, random_codes):
    for frames in (10, 11):
        with pytest.raises(UserError, match=rf"prompt has {frames} frames .* shorten"):
            continue_codes(lm, random_codes(4, frames), 10)


# Errors


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1e39}, "temperature"),
        ({"repetition_penalty": 1e39}, "repetition_penalty"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
    ],
)
def test_sampling_out_of_range(values, word):
    with pytest.raises(UserError, match=word):
        Sampling(**values)


def test_no_samples(lm, random_codes):
    with pytest.raises(UserError, match="num_samples"):
        continue_codes(lm, random_codes(4, 1), num_samples=0)


@pytest.mark.parametrize("quantizer", [0, 3])
def test_logits_that_are_not_finite(lm, random_codes, quantizer):
    lm.model.lm_head.weight[lm.stream.base_size + 4 * 7 + quantizer] = math.nan
    with pytest.raises(UserError, match="not finite"):
        continue_codes(lm, random_codes(4, 1), 2, HOT)


def test_codes_out_of_range_are_a_bug(lm):
    with pytest.raises(ValueError, match="2047"):
        continue_codes(lm, torch.full((4, 1), 2048), 5)


# The command line


def options(speech_model, prompt_file, tmp_path, **changes):
    given = {"model_name": str(speech_model(4)), "prompt": (str(prompt_file),), "output": str(tmp_path / "out.wav")}
    return inference.Options(**{**given, "device": "cpu", "max_seconds": 2.0, **changes})


def test_command_line(speech_model, prompt_file, tmp_path, lm):
    command = [sys.executable, "inference.py", "--model_name", str(speech_model(4)), "--prompt", str(prompt_file)]
    command += ["--output", str(tmp_path / "out.wav"), "--max_seconds", "2", "--seed", "5", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "prompt: 0.90 s, 12 frames" in done.stdout
    assert "times real time" in done.stdout
    samples, rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    prompt = lm.codec.encode([load_audio(prompt_file)])[0]
    (result,) = continue_codes(lm, prompt, 25, Sampling(seed=5))
    assert rate == SAMPLE_RATE
    assert len(samples) == (12 + result.codes.shape[1]) * FRAME_SIZE
    start = lm.codec.decode(prompt).clamp(-1, 1).numpy()
    assert np.abs(samples[: len(start)] - start).max() < 1e-4
    assert f"{result.codes.shape[1]} frames" in done.stdout


def test_command_line_error_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inference.py", "--output", str(tmp_path / "nowhere" / "out.wav")])
    with pytest.raises(SystemExit) as caught:
        run_command(inference.main)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "does not exist" in line


def test_several_samples_are_numbered(speech_model, prompt_file, tmp_path):
    written = inference.run(
        options(speech_model, prompt_file, tmp_path, num_samples=3, output=str(tmp_path / "a.flac"))
    )
    assert [path.name for path in written] == ["a-0.flac", "a-1.flac", "a-2.flac"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.flac", "a-1.flac", "a-2.flac"]
    assert not np.array_equal(soundfile.read(written[0])[0], soundfile.read(written[1])[0])


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "opus", "mp3", "aif", "aiff", "WAV"])
def test_output_formats(tmp_path, ending):
    path = tmp_path / f"out.{ending}"
    inference.check_output(path, "prompt.wav")
    inference.write_audio(path, 3 * torch.sin(torch.arange(30 * SAMPLE_RATE) * 0.05))
    waveform = load_audio(path)
    assert abs(waveform.numel() - 30 * SAMPLE_RATE) < SAMPLE_RATE // 10
    assert waveform.abs().max() < 1.5  # clipped to full scale, not wrapped around; lossy formats overshoot


def test_samples_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        inference.write_audio(tmp_path / "out.wav", torch.tensor([0.0, math.nan]))
    assert not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output": "{tmp}/out.xyz"}, "'.xyz' can be written"),
        ({"output": "{tmp}/out"}, "can be written"),
        ({"output": "{tmp}/out.raw"}, "can be written"),
        ({"output": "{tmp}/out.sd2"}, "can be written"),
        ({"output": "{tmp}/nowhere/out.wav"}, "does not exist"),
        ({"output": "{tmp}/folder.wav"}, "a folder"),
        ({"output": "{tmp}/copy.wav", "prompt": ("{tmp}/copy.wav",)}, "a prompt's own file"),
        ({"prompt": ("{tmp}/missing.wav",)}, "no such file"),
        ({"prompt": ("{tmp}/text.wav",)}, "not a readable audio file"),
        ({"prompt": ("http://127.0.0.1:9/x.wav",)}, "could not be downloaded"),
        ({"max_seconds": 0.5}, "lasts 0.90 s and --max_seconds allows 0.5 s"),
        ({"num_samples": 0}, "num_samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_window": 0}, "repetition_window"),
        ({"repetition_window": 257}, "repetition_window"),
        ({"unconditional": True}, "neither --prompt nor --text"),
        ({"prompt": ("{tmp}/folder.wav",)}, "no audio file"),
        ({"output": "-", "num_samples": 2}, "one prompt, one sample"),
        ({"output": "-", "spectrogram": True}, "neither --report"),
        ({"report": "{tmp}/folder.wav"}, "a folder"),
        ({"report": "{tmp}/nowhere/r.json"}, "does not exist"),
        ({"temperature": -1.0}, "temperature"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:99"}, "not available"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(tmp_path, prompt_file, changes, words):
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "copy.wav").write_bytes(prompt_file.read_bytes())
    (tmp_path / "text.wav").write_text("not audio")

    def fill(value):
        if isinstance(value, tuple):
            return tuple(fill(part) for part in value)
        return value.format(tmp=tmp_path) if isinstance(value, str) else value

    changes = {key: fill(value) for key, value in changes.items()}
    given = {"model_name": "/no/such/model", "prompt": (str(prompt_file),), "output": str(tmp_path / "out.wav")}
    with pytest.raises(UserError) as caught:
        inference.run(inference.Options(**{**given, **changes}))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompt_over_the_default_bound(speech_model, tmp_path):
    for seconds, words in ((20.4, r"255 frames \(20.40 s\)"), (100.0, r"lasts 100.00 s")):
        path = tmp_path / f"{seconds}.mp3"
        soundfile.write(path, np.zeros(round(seconds * 8_000)), 8_000)
        with pytest.raises(UserError, match=words):
            inference.run(options(speech_model, path, tmp_path, max_seconds=None))


def test_several_prompts_and_a_folder(speech_model, prompt_file, tmp_path, make_sound, capsys):
    """Each prompt gets what it gets alone, and one that cannot be used costs only itself."""
    folder = tmp_path / "prompts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.flac").write_bytes(make_sound(1, 0.5))
    (folder / "deep" / "a.wav").write_bytes(make_sound(2, 0.7, file_format="WAV"))
    (folder / "broken.wav").write_text("no audio")
    (folder / "notes.txt").write_text("not searched for")
    prompts = (str(prompt_file), str(folder))
    given = {"prompt": prompts, "output": f"{tmp_path}/out/", "num_samples": 2, "report": str(tmp_path / "report.json")}
    with pytest.raises(UserError, match="1 of 4 prompts"):
        inference.run(options(speech_model, prompt_file, tmp_path, **given))
    assert "broken.wav: not a readable audio file" in capsys.readouterr().err
    names = ["a-0.wav", "a-1.wav", "a-2-0.wav", "a-2-1.wav", "prompt-0.wav", "prompt-1.wav"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    report = json.loads((tmp_path / "report.json").read_text())
    assert [Path(entry["output"]).name for entry in report["outputs"]] == [*names[4:], *names[:4]]
    assert list(report["failed"]) == [str(folder / "broken.wav")]
    (alone, _) = inference.run(options(speech_model, prompt_file, tmp_path, num_samples=2, batch_size=1))
    assert np.array_equal(soundfile.read(alone)[0], soundfile.read(tmp_path / "out" / "prompt-0.wav")[0])


def test_no_prompt_is_written_over(tmp_path, prompt_file):
    """Not even by what another prompt's output is called."""
    (tmp_path / "out-b.wav").write_bytes(prompt_file.read_bytes())
    (tmp_path / "b.wav").write_bytes(prompt_file.read_bytes())
    prompts = (str(tmp_path / "b.wav"), str(tmp_path / "out-b.wav"))
    with pytest.raises(UserError, match=r"out-b\.wav: this is a prompt's own file"):
        inference.run(inference.Options(model_name="/no", prompt=prompts, output=str(tmp_path / "out.wav")))


def test_prompts_have_random_numbers_of_their_own(lm, random_codes):
    requests = [sample_requests(random_codes(4, 5, seed=seed), 9, HOT, 2) for seed in (1, 1, 2)]
    numbers = [[request.sample for request in each] for each in requests]
    assert numbers[0] == numbers[1]
    assert len({*numbers[0], *numbers[2]}) == 4


def test_a_run_that_was_stopped_goes_on(speech_model, prompt_file, tmp_path):
    given = {"num_samples": 3, "output": str(tmp_path / "o.wav")}
    written = inference.run(options(speech_model, prompt_file, tmp_path, **given))
    contents = [path.read_bytes() for path in written]
    written[1].unlink()
    written[0].write_bytes(b"kept")
    again = inference.run(options(speech_model, prompt_file, tmp_path, **given, skip_existing=True))
    assert again == [written[1]]
    assert [path.read_bytes() for path in written] == [b"kept", *contents[1:]]


def test_speech_to_standard_output(speech_model, prompt_file, tmp_path):
    command = [sys.executable, "inference.py", "--model_name", str(speech_model(4)), "--prompt", str(prompt_file)]
    command += ["--output", "-", "--max_seconds", "2", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    samples = np.frombuffer(done.stdout, "<i2") / 32767
    (file,) = inference.run(options(speech_model, prompt_file, tmp_path, output=str(tmp_path / "o.flac")))
    expected, _ = soundfile.read(file)
    assert samples.shape == expected.shape
    assert np.abs(samples - expected).max() < 2e-4
    assert b"times real time" in done.stderr


def test_speech_from_text_and_from_nothing(speech_model, prompt_file, tmp_path, capsys):
    for changes in ({"text": "three four"}, {"unconditional": True}, {"unconditional": True, "unconstrained": True}):
        (path,) = inference.run(options(speech_model, prompt_file, tmp_path, **{"prompt": None, **changes}))
        frames = int(re.search(r"continuation: (\d+) frames", capsys.readouterr().out).group(1))
        assert soundfile.info(path).frames == frames * FRAME_SIZE


def test_longer_than_the_context(speech_model, prompt_file, tmp_path):
    given = {"max_seconds": 8.0, "context_seconds": 2.0, "temperature": 2.0, "spectrogram": True}
    (path,) = inference.run(options(speech_model, prompt_file, tmp_path, **given))
    assert soundfile.info(path).duration == 8.0
    picture = path.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    with pytest.raises(UserError, match="does not fit into --context_seconds"):
        inference.run(options(speech_model, prompt_file, tmp_path, **{**given, "context_seconds": 0.5}))


def test_eight_bit_weights(speech_model, prompt_file, tmp_path):
    (path,) = inference.run(options(speech_model, prompt_file, tmp_path, dtype="int8"))
    assert soundfile.info(path).duration > 0.96  # the prompt's twelve frames


def test_output_names():
    sources = ["x/a.wav", "y/a.mp3", "https://host/b.flac?size=1", None]
    found = inference.output_paths("o.flac", sources, 1)
    assert [path.name for (path,) in found] == ["o-a.flac", "o-a-2.flac", "o-b.flac", "o-speech.flac"]
    assert [path.name for path in inference.output_paths("o.flac", ["x/a.wav"], 2)[0]] == ["o-0.flac", "o-1.flac"]


@pytest.fixture
def server(tmp_path):
    """A file server on this machine; gives its address and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()


def test_prompt_from_an_address(server, prompt_file, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    address, folder = server
    (folder / "prompt.wav").write_bytes(prompt_file.read_bytes())
    assert torch.equal(inference.read_prompt(f"{address}/prompt.wav", 2.0), load_audio(prompt_file))
    with pytest.raises(UserError, match="404"):
        inference.read_prompt(f"{address}/missing.wav", 2.0)
    monkeypatch.setattr(inference, "DOWNLOAD_MAX_BYTES", 10_000)
    with pytest.raises(UserError, match="larger than"):
        inference.download(f"{address}/prompt.wav")


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x.wav", "file:///etc/passwd", "data:,x"])
def test_an_address_leads_to_http_only(tmp_path, monkeypatch, target):
    class Redirecting(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=r"redirects to ftp, and only|Redirection to url .* is not allowed"):
            inference.download(f"http://127.0.0.1:{httpd.server_port}/x.wav")
        httpd.shutdown()


def test_the_time_limit_of_a_download_covers_its_headers(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(inference, "DOWNLOAD_MAX_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle():
            connection = listener.accept()[0]
            with contextlib.suppress(OSError), connection:
                for _ in range(200):
                    connection.sendall(b"H")
                    time.sleep(0.1)

        threading.Thread(target=trickle, daemon=True).start()
        begin = time.monotonic()
        with pytest.raises(UserError, match="the download took more than"):
            inference.download(f"http://127.0.0.1:{listener.getsockname()[1]}/x.wav")
        assert time.monotonic() - begin < 10
