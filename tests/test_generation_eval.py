"""Scores of generated speech: their formulas, small real models behind them, and the command."""

import json
import math
import statistics
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import soundfile
import torch

from tests.test_eval import wav
from torchtitan.audio.codec import FRAME_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE, load_audio
from torchtitan.eval import generation, scorers
from torchtitan.eval.generation import Options, command
from torchtitan.eval.scorers import (
    Judge,
    Naturalness,
    PromptedSpeech,
    Repetition,
    ScoreError,
    SpeakerSimilarity,
    TextLikelihood,
    Transcriber,
    auto_bleu,
    generative_perplexity,
    mean_auto_bleu,
)
from torchtitan.tools.errors import UserError

CPU = torch.device("cpu")


def of_words(text: str | None, before: str | None = None) -> PromptedSpeech:
    return PromptedSpeech(torch.ones(10), torch.ones(10), text, before)


# --- formulas


def test_auto_bleu_is_the_share_of_repeated_n_grams():
    words = "the cat sat on the cat".split()
    assert auto_bleu(words, 1) == 4 / 6  # the, cat, the, cat
    assert auto_bleu(words, 2) == 2 / 5  # the cat, the cat
    assert auto_bleu(words, 3) == 0
    assert mean_auto_bleu(words) == pytest.approx(math.sqrt(4 / 6 * 2 / 5))
    assert auto_bleu(["a"] * 9, 4) == 1
    with pytest.raises(ScoreError, match="no 2-gram"):
        mean_auto_bleu(["one"])


def test_repetition_reads_words_without_case_and_punctuation():
    assert Repetition()(of_words("The cat, the CAT.")) == pytest.approx(math.sqrt(1 * 2 / 3))
    for text, reason in ((None, "no transcript"), ("  ", "empty"), ("word", "2-gram")):
        with pytest.raises(ScoreError, match=reason):
            Repetition()(of_words(text))


def test_generative_perplexity_is_exp_of_the_mean_over_samples():
    assert generative_perplexity([1.0, 2.0, 6.0]) == pytest.approx(math.exp(3.0))


# --- small models


def tiny_wavlm(folder: Path) -> str:
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = WavLMConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            tdnn_dim=(8, 8),
            tdnn_kernel=(3, 1),
            tdnn_dilation=(1, 1),
            xvector_output_dim=6,
        )
        WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return str(folder)


def tiny_recognizer(folder: Path) -> str:
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    folder.mkdir(parents=True)
    letters = ["<pad>", "<unk>", "|", *"abcdefgh"]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = Wav2Vec2Config(
            vocab_size=len(letters),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=(8, 8),
            conv_stride=(40, 20),
            conv_kernel=(40, 20),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            pad_token_id=0,
        )
        Wav2Vec2ForCTC(config).save_pretrained(folder)
    return str(folder)


def tiny_text_model(folder: Path, tokenizer) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            initializer_range=0.3,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_utmos(folder: Path) -> str:
    """A repository of torch.hub whose model gives the loudness."""
    folder.mkdir(parents=True)
    (folder / "hubconf.py").write_text(
        "import torch\n\n\nclass Loudness(torch.nn.Module):\n"
        "    def forward(self, wave, rate):\n        assert rate == 16000\n        return wave.abs().amax(dim=1)\n\n\n"
        "def utmos22_strong():\n    return Loudness()\n"
    )
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_tokenizer) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "speaker_model": tiny_wavlm(folder / "wavlm"),
        "recognizer": tiny_recognizer(folder / "recognizer"),
        "text_model": tiny_text_model(folder / "text", make_tokenizer()),
        "utmos": tiny_utmos(folder / "utmos"),
    }


def sound(seconds: float, seed: int) -> torch.Tensor:
    return load_audio(wav(seconds, seed))


def test_speaker_similarity_is_the_cosine_of_x_vectors(models):
    import torchaudio.functional
    from transformers import WavLMForXVector

    first, second = sound(0.5, 1), sound(0.4, 9)
    scorer = SpeakerSimilarity(models["speaker_model"], CPU)
    assert scorer(PromptedSpeech(first, first)) == pytest.approx(1)
    model = WavLMForXVector.from_pretrained(models["speaker_model"]).eval()
    vectors = []
    for waveform in (first, second):
        samples = torchaudio.functional.resample(waveform, 24_000, 16_000)
        with torch.no_grad():
            vectors.append(model(((samples - samples.mean()) / samples.std(correction=0))[None]).embeddings[0])
    assert scorer(PromptedSpeech(first, second)) == pytest.approx(
        float(torch.cosine_similarity(*vectors, dim=0)), abs=1e-4
    )
    for short, reason in ((torch.zeros(0), "empty"), (torch.zeros(100), "too short")):
        with pytest.raises(ScoreError, match=reason):
            scorer(PromptedSpeech(first, short))


def test_naturalness_is_what_the_hub_model_says(models):
    scorer = Naturalness(models["utmos"], CPU)
    steady = torch.full((24_000,), 0.25)
    assert scorer(PromptedSpeech(steady, steady)) == pytest.approx(0.25, abs=0.02)


def test_mean_nll_of_a_transcript(models, make_tokenizer):
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer()
    model = LlamaForCausalLM.from_pretrained(models["text_model"]).eval()
    text = "the cat sat"
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    expected = -statistics.mean(logits[i, token].item() for i, token in enumerate(ids[1:]))
    scorer = TextLikelihood(models["text_model"], CPU)
    assert scorer(of_words(text)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ScoreError, match="2 to 64"):
        scorer(of_words("cat " * 100))
    with pytest.raises(ScoreError, match="empty"):
        scorer(of_words(""))


def test_transcripts(models):
    import torchaudio.functional
    from transformers import Wav2Vec2ForCTC, Wav2Vec2Processor

    scorer, speech = Transcriber(models["recognizer"], CPU), sound(0.5, 3)
    samples = torchaudio.functional.resample(speech, 24_000, 16_000)
    normal = ((samples - samples.mean()) / samples.std(correction=0))[None]
    with torch.no_grad():
        ids = Wav2Vec2ForCTC.from_pretrained(models["recognizer"]).eval()(normal).logits.argmax(dim=-1)
    expected = Wav2Vec2Processor.from_pretrained(models["recognizer"]).batch_decode(ids)[0]
    assert scorer(speech) == expected.strip() != ""
    with pytest.raises(ScoreError, match="empty"):
        scorer(torch.zeros(0))


@pytest.mark.parametrize("make", [SpeakerSimilarity, Naturalness, Transcriber, TextLikelihood])
def test_a_model_that_is_not_there_is_one_sentence(make, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"could not be loaded from there"):
        make(str(tmp_path / "empty"), CPU)


# --- a judge


@pytest.fixture
def endpoint():
    """An endpoint that answers with the next of some (status, answer); asked gets the requests."""
    answers: list[tuple[int, str]] = []
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            status, answer = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            if status == 200:
                self.wfile.write(json.dumps({"choices": [{"message": {"content": answer}}]}).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", answers, asked
    server.shutdown()


def test_a_judge_is_asked_and_understood(endpoint, tmp_path, monkeypatch):
    url, answers, asked = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    (tmp_path / "prompt.txt").write_text("After {prompt} comes {continuation}?")
    judge = Judge(url, "wise", str(tmp_path / "prompt.txt"))
    answers.append((200, "A score of 5 would be too much.\n**Score:** 3.5"))
    assert judge(of_words("two", "one")) == 3.5
    answers.append((200, "Score (1-5): 4"))
    assert judge(of_words("two", "one")) == 4
    assert asked[0]["messages"] == [{"role": "user", "content": "After one comes two?"}]
    assert (asked[0]["path"], asked[0]["model"], asked[0]["key"]) == ("/v1/chat/completions", "wise", "Bearer secret")


@pytest.mark.parametrize(
    ("given", "reason", "tries"),
    [
        ([(200, "I cannot say.")], "has no score", 1),
        ([(200, "Score: 9")], "not from 1 to 5", 1),
        ([(401, "")], "answers 401", 1),
        ([(500, "")] * 3, "answers 500", 3),
    ],
)
def test_a_judge_that_fails(endpoint, monkeypatch, given, reason, tries):
    url, answers, asked = endpoint
    monkeypatch.setattr(scorers.time, "sleep", lambda seconds: None)
    answers.extend(given)
    judge = Judge(url, "wise", Options(Path()).judge_prompt)
    with pytest.raises(ScoreError, match=reason):
        judge(of_words("two", "one"))
    assert len(asked) == tries


def test_a_judge_that_is_busy_is_asked_again(endpoint, monkeypatch):
    url, answers, _ = endpoint
    monkeypatch.setattr(scorers.time, "sleep", lambda seconds: None)
    answers.extend([(429, ""), (503, ""), (200, "Score: 2")])
    assert Judge(url, "wise", Options(Path()).judge_prompt)(of_words("two")) == 2


def test_prompt_files_that_cannot_be_used(tmp_path):
    (tmp_path / "prompt.txt").write_text("Is it good?")
    with pytest.raises(UserError, match=r"must contain \{continuation\}"):
        Judge("http://x", "m", str(tmp_path / "prompt.txt"))
    with pytest.raises(UserError, match="cannot be read"):
        Judge("http://x", "m", str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="must begin with http"):
        Judge("x", "m", Options(Path()).judge_prompt)


# --- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory, mimi_folder, save_speech_model) -> Path:
    return save_speech_model(tmp_path_factory.mktemp("runs") / "run" / "step-1", mimi_folder)


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "prompts" / "more").mkdir(parents=True)
    for i, name in enumerate(("b.wav", "a.wav", "more/c.wav")):
        (tmp_path / "prompts" / name).write_bytes(wav(0.3 + 0.1 * i, i))
    (tmp_path / "prompts" / "broken.wav").write_bytes(b"RIFF and nothing")
    (tmp_path / "prompts" / "notes.txt").write_text("no audio")
    return tmp_path / "prompts"


def options(prompts: Path, model: Path, models: dict[str, str], **more) -> Options:
    settings = {"output_dir": str(prompts.parent / "out"), "device": "cpu", "max_seconds": 1.5, "num_samples": 2}
    return Options(prompts, str(model), **{**settings, **models, **more})


def test_from_prompts_to_results(prompts, model, models, endpoint, capsys):
    url, answers, _ = endpoint
    answers.extend([(200, f"Score: {1 + i % 5}") if i != 2 else (200, "none") for i in range(6)])
    asked = options(
        prompts,
        model,
        models,
        metrics=["speaker_similarity", "utmos", "perplexity", "auto_bleu", "judge"],
        judge_url=url,
        judge_model="wise",
    )
    assert command(asked) == 1  # one prompt is no audio
    folder = prompts.parent / "out" / "generation" / "run" / "step-1"
    results = json.loads((folder / "results.json").read_text())
    (unusable,) = results["unusable_prompts"]
    assert unusable["prompt"] == "broken.wav"
    assert results["samples"] == 6
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a.wav", "b.wav", "broken.wav", "more/c.wav"]
    for line in lines:
        for sample in line.get("samples", []):
            audio, rate = soundfile.read(folder / sample["file"])
            assert rate == SAMPLE_RATE
            assert len(audio) == (sample["prompt_frames"] + sample["frames"]) * FRAME_SIZE <= 1.5 * SAMPLE_RATE
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    for metric, figures in results["metrics"].items():
        values = [score["value"] for score in scores if score["metric"] == metric and "value" in score]
        assert figures["samples"] == len(values)
        assert figures["samples"] + figures["failed"] == 6
        assert sum(figures["reasons"].values()) == figures["failed"]
        if values:
            mean = statistics.mean(values)
            assert figures["value"] == pytest.approx(math.exp(mean) if metric == "perplexity" else mean)
    assert results["metrics"]["speaker_similarity"]["failed"] == 0
    judged = results["metrics"]["judge"]
    transcribed = sum("value" in score and bool(score["value"]) for score in scores if score["metric"] == "transcript")
    assert judged["samples"] <= transcribed
    assert judged["failed"] >= 1
    assert "6 continuations" in capsys.readouterr().out


def test_the_same_command_goes_on_where_one_was_interrupted(prompts, model, models, monkeypatch):
    class Stopped(BaseException):
        pass

    made: list[int] = []
    generate = generation.Engine.generate

    def stop(*arguments):
        if len(made) == 1:
            raise Stopped
        made.append(1)
        return generate(*arguments)

    monkeypatch.setattr(generation.Engine, "generate", stop)
    asked = options(prompts, model, models, metrics=["speaker_similarity"])
    with pytest.raises(Stopped):
        command(asked)
    folder = prompts.parent / "out" / "generation" / "run" / "step-1"
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"prompt": "b.wa')  # a line that a kill cut off
    first = (folder / "audio" / "a.wav.0.wav").stat().st_mtime_ns
    monkeypatch.setattr(generation.Engine, "generate", lambda *a: made.append(1) or generate(*a))
    assert command(asked) == 1
    assert len(made) == 3
    assert (folder / "audio" / "a.wav.0.wav").stat().st_mtime_ns == first
    found = json.loads((folder / "results.json").read_text())
    alone = options(prompts, model, models, metrics=["speaker_similarity"], output_dir=str(prompts.parent / "alone"))
    command(alone)
    expected = json.loads((prompts.parent / "alone/generation/run/step-1/results.json").read_text())
    assert found["metrics"] == expected["metrics"]
    # Nothing is computed again, nor loaded.
    monkeypatch.setattr(generation, "SpeechLM", None)
    monkeypatch.setattr(generation, "SpeakerSimilarity", None)
    command(asked)
    assert json.loads((folder / "results.json").read_text())["metrics"] == expected["metrics"]
    with pytest.raises(UserError, match=r"continuations with seed = 0, not 5"):
        command(options(prompts, model, models, seed=5))


def test_lines_that_a_kill_cut_and_line_ends_within_a_text(tmp_path):
    lines = generation.Lines(tmp_path / "scores.jsonl")
    entries = [{"value": "one\u2028two\x85three"}, {"value": "é"}]
    for entry in entries:
        lines.append(entry)
    with lines.path.open("ab") as file:
        file.write('{"value": "é'.encode()[:-1])
    assert generation.Lines(lines.path).entries == entries
    generation.Lines(lines.path).append(entries[0])
    assert generation.Lines(lines.path).entries == [*entries, entries[0]]


def test_a_score_that_is_no_number_is_counted(prompts, model, models, monkeypatch):
    monkeypatch.setattr(generation, "_scorer", lambda *_: lambda sample: float("nan"))
    command(options(prompts, model, models, metrics=["utmos"]))
    found = json.loads((prompts.parent / "out/generation/run/step-1/results.json").read_text())["metrics"]["utmos"]
    assert (found["value"], found["samples"]) == (None, 0)
    assert found["failed"] == found["reasons"]["the score is nan"] > 0


def test_a_judge_is_not_asked_about_a_prompt_that_was_not_understood(prompts, model, models, monkeypatch):
    def scorer(metric, *_):
        def score(heard):
            if metric == "prompt_transcript":
                raise ScoreError("it is too quiet")
            return "words"

        made = generation.Transcriber.__new__(generation.Transcriber)
        monkeypatch.setattr(generation.Transcriber, "__call__", lambda self, heard: score(heard))
        return made if metric.endswith("transcript") else lambda sample: pytest.fail("the judge was asked")

    monkeypatch.setattr(generation, "_scorer", scorer)
    command(options(prompts, model, models, metrics=["judge"], judge_model="wise"))
    found = json.loads((prompts.parent / "out/generation/run/step-1/results.json").read_text())["metrics"]["judge"]
    assert found["failed"] == found["reasons"]["the prompt has no transcript: it is too quiet"] > 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompts": Path("nowhere")}, "no such folder"),
        ({"num_samples": 0}, "--num_samples"),
        ({"temperature": -1.0}, "temperature"),
        ({"metrics": ["judge"]}, "--judge_model"),
        ({"prompt_seconds": 0.01}, "--prompt_seconds"),
    ],
)
def test_wrong_input_is_refused(prompts, model, models, more, said):
    asked = options(prompts, model, models, **{key: value for key, value in more.items() if key != "prompts"})
    asked.prompts = more.get("prompts", prompts)
    with pytest.raises(UserError, match=said):
        command(asked)


def test_a_folder_without_audio_is_refused(tmp_path):
    with pytest.raises(UserError, match="no audio files"):
        generation.find_prompts(tmp_path)
