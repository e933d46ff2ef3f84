"""Scores of generated speech: speaker similarity, naturalness, words, repetition, and a judge.

A scorer scores one sample at a time. It raises :class:`ScoreError` for a sample that cannot be scored, and the caller
counts these. The user names the models. A scorer loads its model when it is created, from transformers or (UTMOS) from
torch.hub.
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
from torchtitan.tools.hub import NO_CODE, local_copy

# Sampling rate of the speaker verification, recognition and UTMOS models.
MODEL_RATE = 16_000
JUDGE_TRIES = 3
JUDGE_TIMEOUT = 120.0


class ScoreError(Exception):
    """A sample cannot be scored; the message is the reason."""


@dataclass
class PromptedSpeech:
    """A prompt and its continuation.

    Attributes:
        prompt: waveform [n] at 24 kHz.
        continuation: waveform [m] at 24 kHz of the new speech alone; m may be 0.
        transcript: words of the continuation, if it was transcribed.
        prompt_transcript: words of the prompt, if it was transcribed.
    """

    prompt: torch.Tensor
    continuation: torch.Tensor
    transcript: str | None = None
    prompt_transcript: str | None = None

    def words(self) -> str:
        """The transcript of the continuation.

        Raises:
            ScoreError: there is none, or it is empty.
        """
        if self.transcript is None:
            raise ScoreError("there is no transcript")
        if not self.transcript.strip():
            raise ScoreError("the transcript is empty")
        return self.transcript


def at_model_rate(waveform: torch.Tensor) -> torch.Tensor:
    """Resample a waveform [n] from 24 kHz to 16 kHz.

    Raises:
        ScoreError: it is empty.
    """
    import torchaudio.functional

    if not waveform.numel():
        raise ScoreError("the continuation is empty")
    return torchaudio.functional.resample(waveform, SAMPLE_RATE, MODEL_RATE)


# --- formulas


def auto_bleu(tokens: Sequence[Hashable], n: int) -> float:
    """The share (0 to 1) of n-grams that occur more than once in a text (Lakhotia et al. 2021, arXiv 2102.01192).

    Raises:
        ScoreError: the text is shorter than n.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    if not grams:
        raise ScoreError(f"{len(tokens)} words hold no {n}-gram")
    counts = Counter(grams)
    return sum(count for count in counts.values() if count > 1) / len(grams)


def mean_auto_bleu(tokens: Sequence[Hashable], n: int = 2) -> float:
    """The geometric mean of auto-BLEU for 1-grams to n-grams; n = 2 gives auto-BLEU-2."""
    return math.prod(auto_bleu(tokens, k) for k in range(1, n + 1)) ** (1 / n)


def generative_perplexity(mean_nlls: Sequence[float]) -> float:
    """exp of the mean over samples of their mean negative log-likelihood per token, in nats."""
    return math.exp(sum(mean_nlls) / len(mean_nlls))


def split_words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[\w']+", text.lower())


# --- models


def _loaded(what: str, name: str, load: Callable[[], Any]) -> Any:
    """The result of a loading function. Its errors become one sentence."""
    try:
        return load()
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{name}: {what} could not be loaded from there ({reason.rstrip('.')}).") from None


def _pretrained(what: str, name: str, kind: Any) -> Any:
    """A model or tokenizer of transformers, by hub name or folder."""
    return _loaded(what, name, lambda: kind.from_pretrained(local_copy(name), **NO_CODE))


class SpeakerSimilarity:
    """Cosine (-1 to 1) of the x-vectors of prompt and continuation, from a speaker verification model such as WavLM."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        self.device = device
        self.extractor = _pretrained("a feature extractor", name, AutoFeatureExtractor)
        model = _pretrained("a speaker verification model", name, AutoModelForAudioXVector)
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def embed(self, waveform: torch.Tensor) -> torch.Tensor:
        """The x-vector [D], normalised to length 1, of a waveform [n] at 24 kHz.

        Raises:
            ScoreError: it is empty, or too short for the model.
        """
        sound = at_model_rate(waveform)
        inputs = self.extractor(sound.numpy(), sampling_rate=MODEL_RATE, return_tensors="pt")
        try:
            vector = self.model(**inputs.to(self.device)).embeddings[0].float().cpu()
        except RuntimeError as error:  # from convolutions with kernels longer than the input
            raise ScoreError(f"{waveform.numel() / SAMPLE_RATE:.2f} s are too short for the model ({error})") from None
        return torch.nn.functional.normalize(vector, dim=0)

    def __call__(self, sample: PromptedSpeech) -> float:
        return float(self.embed(sample.prompt) @ self.embed(sample.continuation))


class Naturalness:
    """UTMOS: a model's prediction of the mean opinion score, 1 to 5 (Saeki et al. 2022), through torch.hub.

    Args:
        repository: a repository on github.com with its version, such as tarepan/SpeechMOS:v1.2.0, or a local folder.
    """

    def __init__(self, repository: str, device: torch.device, entry: str = "utmos22_strong"):
        source = "local" if Path(repository).expanduser().is_dir() else "github"

        def load() -> Any:
            return torch.hub.load(str(repository), entry, source=source, trust_repo=True)

        self.device = device
        self.model = _loaded("UTMOS", repository, load).to(device).eval()

    @torch.inference_mode()
    def __call__(self, sample: PromptedSpeech) -> float:
        return float(self.model(at_model_rate(sample.continuation)[None].to(self.device), MODEL_RATE).mean())


class Transcriber:
    """Transcribes speech with a recogniser of transformers, such as Whisper."""

    def __init__(self, name: str, device: torch.device):
        from transformers import pipeline

        self.pipeline = _loaded(
            "a speech recogniser",
            name,
            lambda: pipeline("automatic-speech-recognition", model=local_copy(name), device=device, **NO_CODE),
        )

    def __call__(self, waveform: torch.Tensor) -> str:
        """The words of a waveform [n] at 24 kHz, which may be longer than 30 s.

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
    """Mean negative log-likelihood per token, in nats, of a transcript under a language model of text."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = device
        self.tokenizer = _pretrained("a tokenizer", name, AutoTokenizer)
        model = _pretrained("a language model", name, AutoModelForCausalLM)
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, sample: PromptedSpeech) -> float:
        ids = self.tokenizer(sample.words(), add_special_tokens=False)["input_ids"]
        start = self.tokenizer.bos_token_id
        ids = ids if start is None else [start, *ids]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if len(ids) < 2 or (limit is not None and len(ids) > limit):
            raise ScoreError(f"the transcript has {len(ids)} tokens, but the language model takes 2 to {limit}")
        tokens = torch.tensor([ids], device=self.device)
        logits = self.model(input_ids=tokens).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))


class Repetition:
    """auto-BLEU-2 of the words of the transcript."""

    def __call__(self, sample: PromptedSpeech) -> float:
        return mean_auto_bleu(split_words(sample.words()))


class Judge:
    """A language model at an OpenAI-compatible endpoint, which answers the question in a prompt file with a score.

    The file contains ``{continuation}`` and may contain ``{prompt}`` in place of the two transcripts. The score is the
    number after the last "score:" in the answer. The environment variable OPENAI_API_KEY has the key.

    Args:
        url: address without /chat/completions.

    Raises:
        UserError: the prompt file is missing, or does not contain {continuation}.
    """

    def __init__(self, url: str, model: str, prompt_file: str, low: float = 1.0, high: float = 5.0):
        try:
            self.prompt = Path(prompt_file).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{prompt_file}: the judge's prompt file cannot be read ({error}).") from None
        if "{continuation}" not in self.prompt:
            raise UserError(f"{prompt_file}: the judge's prompt file must contain {{continuation}}.")
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{url}: the judge's address must begin with http:// or https://.")
        self.url, self.model, self.low, self.high = f"{url.rstrip('/')}/chat/completions", model, low, high

    def __call__(self, sample: PromptedSpeech) -> float:
        text = self.prompt.replace("{prompt}", sample.prompt_transcript or "").replace("{continuation}", sample.words())
        return self.read(self.ask(text))

    def ask(self, text: str) -> str:
        """The endpoint's answer.

        Raises:
            ScoreError: it gives no answer after several tries.
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
            ScoreError: there is no score, or it is out of range.
        """
        # Skips a scale in brackets, as in "Score (1-5): 4".
        found = re.findall(r"score(?:\s*[(\[][^)\]]*[)\]])?\W*?(-?\d+(?:\.\d+)?)", answer, re.IGNORECASE)
        if not found:
            raise ScoreError(f"the judge's answer has no score: {answer[:80]!r}")
        score = float(found[-1])
        if not self.low <= score <= self.high:
            raise ScoreError(f"the judge's score {score:g} is not from {self.low:g} to {self.high:g}")
        return score
