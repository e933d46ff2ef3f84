"""The five measures of a codec."""

import itertools
import time
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from torchtitan.audio.codec import FRAME_RATE, FRAME_SIZE, Codec
from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.codec_training.codebooks import k_means, nearest
from torchtitan.codec_training.data import TEACHER_COLUMNS, normalised_mfcc
from torchtitan.codec_training.judging.clips import VoicedClip, Word
from torchtitan.codec_training.judging.codes import code_use, histogram, information
from torchtitan.codec_training.judging.hearing import (
    Classifier,
    intelligibility,
    log_mel_distance,
    score,
    speaks,
    summary,
    voice_features,
    word_features,
)
from torchtitan.codec_training.voices import PROMPT_SECONDS, VOICES
from torchtitan.generation import BATCH_ROWS, Engine, Sampling, frame_bound, sample_requests
from torchtitan.tools.errors import UserError

QUANTIZERS = (8, 4)  # quantizers of round trips: all of a small codec, and the token stream's default
SOUNDS = 64
"""Clusters that stand for the sounds: fewer than in training, since 30 minutes must suffice to count them by code."""
HISTOGRAM_PENALTY = 1.0
"""L2 penalty of the classifiers of histograms: the best of 0.001 to 1 in cross-validation over the training clips."""
WORD_MARGIN = 2 * FRAME_SIZE  # samples of silence around a word, so that it does not begin at the codec's first frame
CONTINUATION_SECONDS = 3.0  # longest continuation
LEAST_ACCURACY = 0.5  # for the voices of clean prompts; below it, the clips are not in the order of the voices


class CodecJudge:
    """A codec and the speech it is judged on. Each method is one of the measures and returns its figures.

    Args:
        codec: with 8 quantizers.
        training, held_out: clips with their voices.

    Raises:
        UserError: a voice is held out that no training clip has.
    """

    def __init__(self, codec: Codec, training: list[VoicedClip], held_out: list[VoicedClip], seed: int):
        self.codec, self.training, self.held_out, self.seed = codec, training, held_out, seed
        self.voices = sorted({clip.voice for clip in training})
        if unknown := {clip.voice for clip in held_out} - set(self.voices):
            raise UserError(f"the voice {VOICES[min(unknown)].name} is held out, but no training clip has it.")
        self.timing: dict[str, float] = {}
        started = time.perf_counter()
        self.training_codes = self.encode([clip.waveform for clip in training], "codes of training clips")
        waveforms = [clip.waveform for clip in held_out]
        self.held_out_codes = self.encode(waveforms, "codes of held-out clips")
        samples = sum(len(clip.waveform) for clip in (*training, *held_out))
        self.timing["encoded_times_real_time"] = samples / SAMPLE_RATE / (time.perf_counter() - started)
        self.made = {q: self.decode(self.held_out_codes, waveforms, q) for q in QUANTIZERS}
        features = [voice_features(clip.waveform) for clip in tqdm(training, "voices", mininterval=5)]
        labels = torch.tensor([clip.voice for clip in training])
        self.voice_of = Classifier(torch.stack(features), labels, len(VOICES))

    def encode(self, waveforms: list[torch.Tensor], what: str) -> list[torch.Tensor]:
        """Codes [8, T] of waveforms [n], each alone."""
        return [self.codec.encode([waveform])[0] for waveform in tqdm(waveforms, what, mininterval=5)]

    def decode(self, codes: list[torch.Tensor], waveforms: list[torch.Tensor], quantizers: int) -> list[torch.Tensor]:
        """The waveforms [n] after a round trip through the first quantizers of their codes [8, T]."""
        pairs = tqdm(zip(codes, waveforms, strict=True), f"{quantizers} quantizers", len(codes), mininterval=5)
        return [self.codec.decode(rows[:quantizers])[: len(waveform)] for rows, waveform in pairs]

    def round_trips(self, real: dict[str, list[VoicedClip]]) -> dict[str, Any]:
        """STOI and log-mel distance of the held-out clips and of other speech, at each number of quantizers."""

        def judge(made: list[torch.Tensor], true: list[VoicedClip]) -> dict[str, Any]:
            pairs = [(a, b.waveform) for a, b in zip(made, true, strict=True)]
            stoi = [intelligibility(*pair) for pair in tqdm(pairs, "STOI", mininterval=5)]
            distance = [log_mel_distance(*pair) for pair in pairs]
            heard = [(value, clip.voice) for value, clip in zip(stoi, true, strict=True) if value is not None]
            voices = sorted({clip.voice for clip in true} - {-1})
            by_voice = {VOICES[v].name: summary([value for value, voice in heard if voice == v]) for v in voices}
            found = {"stoi": summary([value for value, _ in heard]), "log_mel_distance_db": summary(distance)}
            return {**found, "stoi_by_voice": by_voice}

        figures = {"held_out": {str(q): judge(made, self.held_out) for q, made in self.made.items()}, "real": {}}
        for name, clips in real.items():
            waveforms = [clip.waveform for clip in clips]
            codes = self.encode(waveforms, f"codes of {name}")
            figures["real"][name] = {str(q): judge(self.decode(codes, waveforms, q), clips) for q in QUANTIZERS}
        return figures

    def codebooks(self) -> dict[str, Any]:
        """For each quantizer: use of its codebook, and what its codes tell about voice and sound.

        Sounds are clusters of speaker-normalised MFCCs, four columns a frame, as the semantic teacher of
        scripts/train_codec.py has them, fitted to the training clips.
        """
        groups = [(self.training, self.training_codes), (self.held_out, self.held_out_codes)]
        mfccs = [
            [normalised_mfcc(clip.waveform) for clip in tqdm(clips, "sounds", mininterval=5)] for clips, _ in groups
        ]
        centroids = k_means(torch.cat(mfccs[0]), SOUNDS, torch.Generator().manual_seed(self.seed))
        sounds = [[nearest(mfcc, centroids) for mfcc in group] for group in mfccs]
        voices = [torch.tensor([clip.voice for clip in clips]) for clips, _ in groups]
        figures = []
        for q in tqdm(range(self.codec.num_quantizers), "codebooks", mininterval=5):
            codes = [[rows[q] for rows in group] for _, group in groups]
            histograms = [torch.stack([histogram(row) for row in group]) for group in codes]
            heard = Classifier(histograms[0], voices[0], len(VOICES), HISTOGRAM_PENALTY)(histograms[1])
            of_voice = [
                [(row, voice.expand(len(row))) for row, voice in zip(*group, strict=True)]
                for group in zip(codes, voices, strict=True)
            ]
            # A rest of less than 20 ms has no column.
            of_sound = [
                [(row.repeat_interleave(TEACHER_COLUMNS)[: len(own)], own) for row, own in zip(*group, strict=True)]
                for group in zip(codes, sounds, strict=True)
            ]
            use = {"quantizer": q, **code_use(torch.cat([*codes[0], *codes[1]]))}
            told = {"about_voice": information(*of_voice), "about_sound": information(*of_sound)}
            figures.append({**use, "voice": score((heard == voices[1]).tolist()), **told})
        frames = sum(rows.shape[1] for _, group in groups for rows in group)
        return {"frames": frames, "chance": 1 / len(self.voices), "quantizers": figures}

    def words(self, words: list[Word]) -> dict[str, Any]:
        """Accuracy of a classifier that learned clean words, on clean words and on their round trips.

        On its way through the codec a word has silence around it, which is cut off again at the right places.
        """
        learned, tests = ([word for word in words if word.test == test] for test in (False, True))
        classes = len({word.word for word in words})
        features = torch.stack([word_features(word.waveform) for word in learned])
        word_of = Classifier(features, torch.tensor([word.word for word in learned]), classes)
        truth = torch.tensor([word.word for word in tests])
        padded = [F.pad(word.waveform, (WORD_MARGIN, WORD_MARGIN)) for word in tests]
        codes = self.encode(padded, "codes of words")
        heard = {"clean": [word.waveform for word in tests]}
        for q in QUANTIZERS:
            heard[str(q)] = [made[WORD_MARGIN:-WORD_MARGIN] for made in self.decode(codes, padded, q)]
        figures: dict[str, Any] = {"chance": 1 / classes, "learned_from": len(learned)}
        for name, waveforms in heard.items():
            said = word_of(torch.stack([word_features(waveform) for waveform in waveforms]))
            figures[name] = score((said == truth).tolist())
        return figures

    def speakers(self) -> dict[str, Any]:
        """Accuracy of a classifier that learned clean voices, on clean clips and on round trips."""
        truth = [clip.voice for clip in self.held_out]
        heard = {"clean": [clip.waveform for clip in self.held_out], **{str(q): made for q, made in self.made.items()}}
        return self.chances() | {name: self.hear_voices(waveforms, truth) for name, waveforms in heard.items()}

    def chances(self) -> dict[str, Any]:
        """Accuracies of guessing voices, and of always guessing the more frequent gender."""
        count, women = len(self.voices), sum(VOICES[voice].gender == "female" for voice in self.voices)
        return {"chance": 1 / count, "gender_chance": max(women, count - women) / count}

    def hear_voices(self, waveforms: list[torch.Tensor], truth: list[int]) -> dict[str, Any]:
        """Scores of the classifier of voices on waveforms [n], for the voice and for its gender."""
        said = [int(self.voice_of(voice_features(waveform)[None])) for waveform in waveforms]
        pairs = list(zip(said, truth, strict=True))
        return {
            "voice": score([a == b for a, b in pairs]),
            "gender": score([VOICES[a].gender == VOICES[b].gender for a, b in pairs]),
        }

    def continuations(self, lm: Any, pairs: list[VoicedClip]) -> dict[str, Any]:
        """Whether a model goes on in the voice of its prompt, the first 1.28 s of each clip, for up to 3 s.

        The round trip of the true rest of the clips is the best that can be expected of a model.

        Args:
            lm: the SpeechLM, with the codec that is judged.
            pairs: clips whose voice does not change.
        """
        length = round(PROMPT_SECONDS * SAMPLE_RATE)
        frames = length // FRAME_SIZE
        bound = frame_bound(lm, PROMPT_SECONDS + CONTINUATION_SECONDS)
        truth = [clip.voice for clip in pairs]
        prompts = [clip.waveform[:length] for clip in pairs]
        figures: dict[str, Any] = {"num_quantizers": lm.stream.num_quantizers, "prompts": len(pairs)}
        figures["clean_prompt"] = self.hear_voices(prompts, truth)
        figures["clean_rest"] = self.hear_voices([clip.waveform[length:] for clip in pairs], truth)
        if figures["clean_prompt"]["voice"]["accuracy"] < LEAST_ACCURACY:
            reason = "the voices of SALMon/speaker_consistency do not take turns, as far as their prompts can be heard"
            return {"skipped": f"No continuations were judged: {reason}."}
        rests = [
            lm.codec.decode(lm.codec.encode([clip.waveform])[0])[length : len(clip.waveform)]
            for clip in tqdm(pairs, "true continuations", mininterval=5)
        ]
        figures["round_trip_of_rest"] = self.hear_voices(rests, truth)

        rows = min(len(pairs), BATCH_ROWS["cpu"])
        engine = Engine(lm, rows, lm.stream.sample_length(bound), consume=True)
        sampling = Sampling(temperature=0.8, top_k=30, seed=self.seed)
        codes = [lm.codec.encode([prompt])[0] for prompt in prompts]
        requests = [sample_requests(code, bound - frames, sampling)[0] for code in codes]
        with tqdm(desc="continuations", unit="frame", mininterval=5) as bar:
            results = engine.generate(requests, bar.update)
        # Prompt and continuation are decoded together, as inference.py does it.
        made = [
            lm.codec.decode(torch.cat([code, result.codes], dim=1))[length:]
            for code, result in zip(codes, results, strict=True)
        ]
        speaking = [speaks(waveform, prompt) for waveform, prompt in zip(made, prompts, strict=True)]
        spoken = list(itertools.compress(made, speaking))
        figures["continuation"] = self.hear_voices(spoken, list(itertools.compress(truth, speaking)))
        figures["silent"] = score([not each for each in speaking])
        figures["mean_seconds"] = sum(result.codes.shape[1] for result in results) / len(results) / FRAME_RATE
        return figures | self.chances()
