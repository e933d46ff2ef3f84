"""Scores of generated speech: speaker, naturalness, words, repetition, a judge. One sample at a time, each may fail.

A scorer raises :class:`ScoreError` for a sample that it can give no score; the caller counts it. Every model is named
by the user, loaded when its scorer is made, and comes from transformers or, for UTMOS, from torch.hub.
"""

import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.tools.errors import UserError
from torchtitan.tools.hub import local_copy

# What speaker verification, recognition and UTMOS models hear.
MODEL_RATE = 16_000
JUDGE_TRIES = 3
JUDGE_TIMEOUT = 120.0


class ScoreError(Exception):
    """There is no score for this sample; the message says why."""


@dataclass
class Sample:
    """One continuation.

    Attributes:
        prompt: waveform [n] at 24 kHz, as it was given.
        continuation: waveform [m] at 24 kHz of the new speech alone; m may be 0.
        transcript: its words, where a recogniser has heard it.
        prompt_transcript: the prompt's.
    """

    prompt: torch.Tensor
    continuation: torch.Tensor
    transcript: str | None = None
    prompt_transcript: str | None = None

    def words(self) -> str:
        """The transcript.

        Raises:
            ScoreError: there is none, or it is empty.
        """
        if self.transcript is None:
            raise ScoreError("there is no transcript")
        if not self.transcript.strip():
            raise ScoreError("the transcript is empty")
        return self.transcript


def at_model_rate(waveform: torch.Tensor) -> torch.Tensor:
    """A waveform [n] of 24 kHz at 16 kHz.

    Raises:
        ScoreError: it is empty.
    """
    import torchaudio.functional

    if not waveform.numel():
        raise ScoreError("the continuation is empty")
    return torchaudio.functional.resample(waveform, SAMPLE_RATE, MODEL_RATE)


# --- formulas


def auto_bleu(tokens: Sequence[Hashable], n: int) -> float:
    """The share of n-grams that occur more than once in a text (Lakhotia et al. 2021, arXiv 2102.01192): 0 to 1.

    Raises:
        ScoreError: the text is shorter than n.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    if not grams:
        raise ScoreError(f"{len(tokens)} words hold no {n}-gram")
    counts = Counter(grams)
    return sum(count for count in counts.values() if count > 1) / len(grams)


def mean_auto_bleu(tokens: Sequence[Hashable], n: int = 2) -> float:
    """The geometric mean of auto-BLEU for 1-grams to n-grams, as auto-BLEU-2 is reported."""
    return math.prod(auto_bleu(tokens, k) for k in range(1, n + 1)) ** (1 / n)


def generative_perplexity(mean_nlls: Sequence[float]) -> float:
    """exp of the mean, over samples, of each one's mean negative log-likelihood a token in nats."""
    return math.exp(sum(mean_nlls) / len(mean_nlls))


def split_words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[\w']+", text.lower())


# --- models


def _loaded(what: str, name: str, load: Callable[[], Any]) -> Any:
    """What a loading function returns; its failure as one sentence."""
    try:
        return load()
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{name}: {what} could not be loaded from there ({reason.rstrip('.')}).") from None


class SpeakerSimilarity:
    """Cosine of the x-vectors of prompt and continuation, -1 to 1, by a WavLM (or other) speaker verification model."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        self.device = device
        self.extractor = _loaded(
            "a feature extractor", name, lambda: AutoFeatureExtractor.from_pretrained(local_copy(name))
        )
        model = _loaded(
            "a speaker verification model", name, lambda: AutoModelForAudioXVector.from_pretrained(local_copy(name))
        )
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def embed(self, waveform: torch.Tensor) -> torch.Tensor:
        """The x-vector [D], of length 1, of a waveform [n] at 24 kHz.

        Raises:
            ScoreError: it is empty, or too short for the model.
        """
        sound = at_model_rate(waveform)
        inputs = self.extractor(sound.numpy(), sampling_rate=MODEL_RATE, return_tensors="pt")
        try:
            vector = self.model(**inputs.to(self.device)).embeddings[0].float().cpu()
        except RuntimeError as error:  # of convolutions over fewer values than their kernels have
            raise ScoreError(f"{waveform.numel() / SAMPLE_RATE:.2f} s are too short for the model ({error})") from None
        return torch.nn.functional.normalize(vector, dim=0)

    def __call__(self, sample: Sample) -> float:
        return float(self.embed(sample.prompt) @ self.embed(sample.continuation))


class Naturalness:
    """UTMOS, a mean opinion score from 1 to 5 as a model predicts it (Saeki et al. 2022), through torch.hub.

    Args:
        repository: of github.com with its version, such as tarepan/SpeechMOS:v1.2.0, or a local folder.
    """

    def __init__(self, repository: str, device: torch.device, entry: str = "utmos22_strong"):
        source = "local" if Path(repository).expanduser().is_dir() else "github"

        def load() -> Any:
            return torch.hub.load(str(repository), entry, source=source, trust_repo=True)

        self.device = device
        self.model = _loaded("UTMOS", repository, load).to(device).eval()

    @torch.inference_mode()
    def __call__(self, sample: Sample) -> float:
        return float(self.model(at_model_rate(sample.continuation)[None].to(self.device), MODEL_RATE).mean())


class Transcriber:
    """Words of speech, by a recogniser of transformers, Whisper by default."""

    def __init__(self, name: str, device: torch.device):
        from transformers import pipeline

        self.pipeline = _loaded(
            "a speech recogniser",
            name,
            lambda: pipeline("automatic-speech-recognition", model=local_copy(name), device=device),
        )

    def __call__(self, waveform: torch.Tensor) -> str:
        """The words of a waveform [n] at 24 kHz; of more than 30 s, too.

        Raises:
            ScoreError: it is empty, or the recogniser fails.
        """
        sound = at_model_rate(waveform).numpy()
        options = {"return_timestamps": True} if len(sound) > 30 * MODEL_RATE and self._is_whisper() else {}
        try:
            return str(self.pipeline({"raw": sound, "sampling_rate": MODEL_RATE}, **options)["text"]).strip()
        except (RuntimeError, ValueError, IndexError) as error:
            raise ScoreError(f"the recogniser fails: {next(iter(str(error).splitlines()), '')}") from None

    def _is_whisper(self) -> bool:
        return self.pipeline.model.config.model_type == "whisper"


class TextLikelihood:
    """The mean negative log-likelihood a token, in nats, of a transcript under a language model of text."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = device
        self.tokenizer = _loaded("a tokenizer", name, lambda: AutoTokenizer.from_pretrained(local_copy(name)))
        model = _loaded("a language model", name, lambda: AutoModelForCausalLM.from_pretrained(local_copy(name)))
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, sample: Sample) -> float:
        ids = self.tokenizer(sample.words(), add_special_tokens=False)["input_ids"]
        start = self.tokenizer.bos_token_id
        ids = ids if start is None else [start, *ids]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if len(ids) < 2 or (limit is not None and len(ids) > limit):
            raise ScoreError(f"the transcript has {len(ids)} tokens, the language model takes 2 to {limit}")
        tokens = torch.tensor([ids], device=self.device)
        logits = self.model(input_ids=tokens).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))


class Repetition:
    """auto-BLEU-2 of the transcript's words."""

    def __call__(self, sample: Sample) -> float:
        return mean_auto_bleu(split_words(sample.words()))


class Judge:
    """A language model behind an OpenAI-compatible endpoint that reads a prompt file and answers with a score.

    The file may hold ``{prompt}`` and ``{continuation}``, the two transcripts. The score is the number after the last
    "score:" in the answer, whatever surrounds it. The key is read from the environment variable OPENAI_API_KEY.

    Args:
        url: up to and without /chat/completions.

    Raises:
        UserError: the prompt file is missing, or has no place for the continuation.
    """

    def __init__(self, url: str, model: str, prompt_file: str, low: float = 1.0, high: float = 5.0):
        try:
            self.prompt = Path(prompt_file).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{prompt_file}: the judge's prompt file cannot be read ({error}).") from None
        if "{continuation}" not in self.prompt:
            raise UserError(f"{prompt_file}: the judge's prompt file has no {{continuation}} to be filled in.")
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{url}: the judge's address must begin with http:// or https://.")
        self.url, self.model, self.low, self.high = f"{url.rstrip('/')}/chat/completions", model, low, high

    def __call__(self, sample: Sample) -> float:
        text = self.prompt.replace("{prompt}", sample.prompt_transcript or "").replace("{continuation}", sample.words())
        return self.read(self.ask(text))

    def ask(self, text: str) -> str:
        """The endpoint's answer.

        Raises:
            ScoreError: it does not give one, also not when asked again.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        reason = ""
        for attempt in range(JUDGE_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=JUDGE_TIMEOUT) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                reason = f"the judge answers {error.code} {error.reason}"
                if error.code < 500 and error.code != 429:
                    raise ScoreError(reason) from None
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"the judge gives no answer ({error})"
            if attempt + 1 < JUDGE_TRIES:
                time.sleep(2.0**attempt)
        raise ScoreError(reason)

    def read(self, answer: str) -> float:
        """The score in an answer.

        Raises:
            ScoreError: there is none, or it is out of range.
        """
        # A scale in brackets, as in "Score (1-5): 4", is not the score.
        found = re.findall(r"score(?:\s*[(\[][^)\]]*[)\]])?\W*?(-?\d+(?:\.\d+)?)", answer, re.IGNORECASE)
        if not found:
            raise ScoreError(f"the judge's answer holds no score: {answer[:80]!r}")
        score = float(found[-1])
        if not self.low <= score <= self.high:
            raise ScoreError(f"the judge's score {score:g} is not from {self.low:g} to {self.high:g}")
        return score
