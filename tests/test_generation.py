"""The inference engine: what is drawn, how, and that neither batch nor place in it changes it."""

import itertools
import math
import os
import re
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from torchtitan.audio.token_stream import CODEBOOK_SIZE
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.generation import Engine, Request, Sampling, SpeechService, continue_codes, stream_speech, text_prompt
from torchtitan.generation.engine import whole_frames
from torchtitan.generation.linear import Int8, _agrees, widened
from torchtitan.generation.sampling import (
    candidate_words,
    candidates,
    draw,
    gumbel,
    position_words,
    sample_key,
)
from torchtitan.tools.errors import UserError

HOT = Sampling(temperature=2.0, top_k=None)
GREEDY = Sampling(temperature=0.0)


def make_stops_likely(lm: SpeechLM) -> None:
    """Give ``</audio>`` a row whose logit is high in some states and low in others."""
    weight = lm.model.get_output_embeddings().weight
    row = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(2))
    weight[lm.stream.audio_end_id] = row * 2


class Constraint(LogitsProcessor):
    """The rule of the token stream on whole rows of logits, for a prompt that is BOS, text, <audio> and frames."""

    def __init__(self, stream, num_text: int = 0):
        self.stream, self.num_text = stream, num_text

    def __call__(self, input_ids, scores):
        stream = self.stream
        quantizer = (input_ids.shape[1] - 2 - self.num_text) % stream.num_quantizers
        allowed = list(range(stream.base_size + quantizer, stream.audio_start_id, stream.num_quantizers))
        if quantizer == 0:
            allowed.append(stream.audio_end_id)
        masked = torch.full_like(scores, -math.inf)
        masked[:, allowed] = scores[:, allowed]
        return masked


def generate(lm: SpeechLM, ids: torch.Tensor, new_ids: int, *processors: LogitsProcessor) -> list[int]:
    """transformers' greedy continuation of ids [n]."""
    end = lm.stream.audio_end_id
    options = {"do_sample": False, "max_new_tokens": new_ids, "eos_token_id": end, "pad_token_id": end}
    found = lm.model.generate(
        ids[None],
        attention_mask=torch.ones_like(ids)[None],
        logits_processor=LogitsProcessorList(processors),
        **options,
    )
    return found[0, ids.numel() :].tolist()


# The same as transformers


@pytest.mark.parametrize("num_quantizers", [1, 4])
@pytest.mark.parametrize("prompt_frames", [0, 7])
def test_greedy_equals_generate(load, random_codes, num_quantizers, prompt_frames):
    lm = load(num_quantizers)
    prompt = random_codes(num_quantizers, prompt_frames)
    (result,) = continue_codes(lm, prompt, prompt_frames + 25, GREEDY)
    expected = generate(lm, lm.stream.sample(prompt, end=False), 25 * num_quantizers, Constraint(lm.stream))
    assert lm.stream.sample(result.codes, end=result.ended)[2:].tolist() == expected


def test_greedy_stops_where_generate_stops(lm, random_codes):
    make_stops_likely(lm)
    prompt = random_codes(4, 3)
    (result,) = continue_codes(lm, prompt, 200, GREEDY)
    expected = generate(lm, lm.stream.sample(prompt, end=False), 197 * 4, Constraint(lm.stream))
    assert result.ended
    assert expected[-1] == lm.stream.audio_end_id
    assert lm.stream.encode(result.codes).tolist() == expected[:-1]


def test_greedy_after_a_text_equals_generate(lm, random_codes):
    text = text_prompt(lm, "three four")
    ids = lm.stream.sample(random_codes(4, 2), text, end=False)
    (result,) = Engine(lm).generate([Request(random_codes(4, 2), 8, text, GREEDY)])
    assert lm.stream.encode(result.codes).tolist() == generate(lm, ids, 32, Constraint(lm.stream, len(text)))


@pytest.mark.parametrize("penalty", [1.3, 5.0])
def test_repetition_penalty_is_that_of_transformers(lm, random_codes, penalty):
    prompt = random_codes(4, 3)
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty, repetition_window=256)
    (result,) = Engine(lm).generate([Request(prompt, 30, sampling=sampling)])
    ids = lm.stream.sample(prompt, end=False)
    expected = generate(lm, ids, 120, RepetitionPenaltyLogitsProcessor(penalty), Constraint(lm.stream))
    assert lm.stream.encode(result.codes).tolist() == expected
    (free,) = Engine(lm).generate([Request(prompt, 30, sampling=GREEDY)])
    assert not torch.equal(free.codes, result.codes)


def test_repetition_penalty_forgets_what_left_its_window(lm, random_codes):
    prompt = random_codes(4, 6)
    sampling = Sampling(temperature=0.0, repetition_penalty=1e6, repetition_window=2)
    (result,) = Engine(lm).generate([Request(prompt, 40, sampling=sampling)])
    frames = torch.cat([prompt, result.codes], dim=1)
    ids = lm.stream.sample(frames, end=False)[None]
    logits = lm.model(ids).logits[0, :-1]
    rule = Constraint(lm.stream)
    for frame, quantizer in itertools.product(range(6, 46), range(4)):
        place = 1 + 4 * frame + quantizer  # whose logits decide
        allowed = rule(ids[:, : place + 1], logits[place : place + 1])[0]
        recent = lm.stream.base_size + 4 * frames[quantizer, frame - 2 : frame] + quantizer
        penalized = allowed.clone()
        penalized[recent] = torch.where(allowed[recent] > 0, allowed[recent] / 1e6, allowed[recent] * 1e6)
        assert ids[0, place + 1] == penalized.argmax()


def test_unconstrained_greedy_equals_generate(lm, random_codes):
    prompt = random_codes(4, 3)
    ids = lm.stream.sample(prompt, end=False)
    (result,) = Engine(lm, constrained=False).generate([Request(prompt, 20, sampling=GREEDY)])
    drawn = torch.tensor(generate(lm, ids, 80))
    kept = whole_frames(drawn, lm.stream)
    assert torch.equal(result.codes, lm.stream.decode(kept))
    assert result.dropped == drawn.numel() - kept.numel() > 0


def test_unconstrained_ends_within_a_frame(lm):
    lm.model.lm_head.weight.zero_()
    engine = Engine(lm, constrained=False)
    engine.heads[0] = lambda hidden: torch.nn.functional.one_hot(
        torch.full((len(hidden),), next(ids)), lm.stream.vocab_size
    ).float()
    frame = lm.stream.encode(torch.tensor([[5], [6], [7], [8]])).tolist()
    ids = iter([*frame, frame[0], lm.stream.audio_end_id, *frame])
    (result,) = engine.generate([Request(torch.zeros(4, 0, dtype=torch.int64), 9, sampling=GREEDY)])
    assert result.ended
    assert result.codes.tolist() == [[5], [6], [7], [8]]
    assert result.dropped == 1


def test_whole_frames_are_what_the_original_parses(lm):
    stream, strings = lm.stream, lm.tokenizer.convert_ids_to_tokens
    generator = torch.Generator().manual_seed(0)
    for cut in range(40):
        ids = stream.encode(torch.randint(2048, (4, 12), generator=generator))
        if cut % 2:
            ids[cut] = torch.randint(stream.vocab_size, (), generator=generator)
        if cut % 3 == 0:
            ids = torch.cat([ids[:cut], torch.tensor([7, stream.audio_start_id]), ids[cut:]])
        found = re.findall(r"<(\d+)_(\d+)>", "".join(strings(ids.tolist())))
        expected = []
        for start in range(0, len(found) // 4 * 4, 4):
            frame = found[start : start + 4]
            if [int(quantizer) for _, quantizer in frame] != [0, 1, 2, 3]:
                break
            expected.append([int(code) for code, _ in frame])
        assert stream.decode(whole_frames(ids, stream)).T.tolist() == expected


# Drawing


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (30, 1.0), (None, 0.7), (40, 0.5), (1, 1.0), (5000, 0.9)])
def test_candidates_are_those_of_transformers(top_k, top_p):
    logits = 2 * torch.randn(3, 2049, generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor([0.3, 0.8, 2.0])
    limit = None if top_k is None else torch.full((3,), top_k)
    values, indices = candidates(logits, temperature, limit, torch.full((3,), top_p) if top_p < 1 else None, top_k)
    found = torch.full_like(logits, -math.inf).scatter(1, indices, values)
    for row in range(3):
        scores = logits[row : row + 1] / temperature[row]
        if top_k is not None:
            scores = TopKLogitsWarper(min(top_k, 2049))(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        assert torch.allclose(found[row] / temperature[row], scores[0])


def test_rows_have_their_own_limits():
    logits = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0))
    values, _ = candidates(logits, torch.ones(4), torch.tensor([1, 7, 1 << 30, 30]), None, None)
    assert (values > -math.inf).sum(dim=1).tolist() == [1, 7, 2048, 30]


def test_draws_follow_the_distribution():
    logits = 1.5 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    draws, temperature = 100_000, torch.tensor([0.8])
    words = position_words(torch.tensor([sample_key(0, 0)]), torch.arange(draws)[None])[0]
    values, indices = candidates(logits, temperature, torch.tensor([20]), None, 20)
    chosen = draw(
        values.expand(draws, -1),
        indices.expand(draws, -1),
        temperature.expand(draws),
        words,
        candidate_words(50, "cpu"),
    )
    expected = TopKLogitsWarper(20)(None, logits / 0.8).softmax(dim=1)[0]
    counts = chosen.bincount(minlength=50)
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi_square = ((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum().item()
    assert chi_square < 19 + 5 * math.sqrt(2 * 19)  # mean and standard deviations of 19 degrees of freedom


def test_noise_is_independent_of_seed_sample_position_and_candidate():
    keys = torch.tensor([sample_key(seed, sample) for seed in range(20) for sample in range(20)])
    words = position_words(keys, torch.arange(50).expand(400, -1))
    assert words.unique().numel() > words.numel() - 5  # a few of 20,000 may be equal by chance
    drawn = draw(
        torch.zeros(20_000, 2),
        torch.tensor([0, 1]).expand(20_000, -1),
        torch.ones(20_000),
        words.flatten(),
        candidate_words(2, "cpu"),
    ).view(400, 50)
    for dim in (0, 1):  # runs over keys and positions are those of a fair coin
        changes = (drawn.diff(dim=dim) != 0).float()
        assert abs(changes.mean().item() - 0.5) < 5 * 0.5 / math.sqrt(changes.numel())


def test_gumbel_noise_has_its_distribution():
    words = torch.arange(0, 1 << 32, 4_099)
    noise = gumbel(words).sort().values
    expected = -(-((torch.arange(noise.numel()) + 0.5).double() / noise.numel()).log()).log()
    assert (noise - expected).abs()[100:-100].max() < 0.01
    assert torch.isfinite(gumbel(torch.tensor([0, (1 << 32) - 1]))).all()


def test_extreme_temperatures():
    logits = torch.tensor([[1.0, 3.0, 2.0]]) * 1e4
    for temperature, expected in ((1e-30, {1}), (1e30, {0, 1, 2})):
        words = position_words(torch.tensor([sample_key(1, 1)]), torch.arange(60)[None])[0]
        values, indices = candidates(logits.expand(60, -1), torch.full((60,), temperature), None, torch.ones(60), None)
        drawn = draw(values, indices, torch.full((60,), temperature), words, candidate_words(3, "cpu"))
        assert set(drawn.tolist()) == expected


@pytest.mark.parametrize("sampling", [Sampling(), HOT, Sampling(top_k=None, top_p=0.8)])
def test_each_draw_is_one_from_transformers_logits(lm, random_codes, sampling):
    """The whole path of a draw, with logits of a plain call over everything before it."""
    prompt = random_codes(4, 5)
    results = Engine(lm, 2).generate([Request(prompt, 20, sampling=sampling, sample=i) for i in range(2)])
    rule = Constraint(lm.stream)
    for sample, result in enumerate(results):
        ids = lm.stream.sample(torch.cat([prompt, result.codes], dim=1), end=False)[None]
        logits = lm.model(ids).logits[0]
        numbers = torch.arange(result.codes.numel())[None]
        words = position_words(torch.tensor([sample_key(sampling.seed, sample)]), numbers)[0]
        for number, place in enumerate(range(1 + 4 * 5, ids.shape[1] - 1)):
            allowed = rule(ids[:, : place + 1], logits[place : place + 1])[0]
            few = allowed[allowed > -math.inf]
            limit = None if sampling.top_k is None else torch.tensor([sampling.top_k])
            top_p = torch.tensor([sampling.top_p]) if sampling.top_p < 1 else None
            temperature = torch.tensor([sampling.temperature])
            values, indices = candidates(few[None], temperature, limit, top_p, sampling.top_k)
            drawn = draw(values, indices, temperature, words[number : number + 1], candidate_words(2049, "cpu"))
            assert lm.stream.base_size + 4 * drawn + number % 4 == ids[0, place + 1]


# Batches


def mixed_requests(random_codes) -> list[Request]:
    """Prompts of many lengths with settings of their own."""
    settings = [
        Sampling(),
        HOT,
        GREEDY,
        Sampling(temperature=1.5, top_k=50, top_p=0.9, seed=3),
        Sampling(temperature=1.2, repetition_penalty=1.5, repetition_window=5),
    ]
    lengths = [3, 30, 0, 1, 40, 7, 12, 60, 5, 9]
    return [
        Request(random_codes(4, length, seed=length), 12 + 5 * (length % 3), (), settings[i % 5], sample=i)
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone_and_in_any_batch(speech_model, random_codes, dtype):
    lm = SpeechLM.load(str(speech_model(4)), device="cpu", dtype=dtype)
    make_stops_likely(lm)
    requests = mixed_requests(random_codes)
    alone = [Engine(lm, context=300).generate([request])[0] for request in requests]
    assert len({result.codes.shape[1] for result in alone}) > 4
    assert any(result.ended for result in alone)
    orders = [(2, requests), (4, requests[::-1]), (16, requests)]
    for rows, order in orders:
        together = Engine(lm, rows, context=400).generate(order)
        for request, result in zip(order, together, strict=True):
            expected = alone[requests.index(request)]
            assert torch.equal(result.codes, expected.codes)
            assert result.ended == expected.ended


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(speech_model, random_codes, dtype):
    """Not only the same draws, which survive a rounding error mostly."""
    lm = SpeechLM.load(str(speech_model(4)), device="cpu", dtype=dtype)
    requests = [Request(random_codes(4, length, seed=length), 20, sampling=HOT) for length in (7, 3, 30)]
    states = []
    for some in (requests[:1], requests[:2], requests):
        engine = Engine(lm, len(some), context=200)
        generations = [engine.submit(request) for request in some]
        for _ in range(6):
            engine.advance()
        assert not any(generation.finished for generation in generations)
        states.append(engine._hidden[0].clone())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_equal_logits_are_kept_alike_however_many_are_asked_for():
    logits = torch.randn(2, 2049, generator=torch.Generator().manual_seed(6)).bfloat16().float()
    assert logits[0].sort(descending=True).values[19] == logits[0].sort(descending=True).values[20]
    alone = candidates(logits[:1], torch.ones(1), torch.tensor([20]), None, 20)
    mixed = candidates(logits, torch.ones(2), torch.tensor([20, 1 << 30]), None, None)
    kept = [set(indices[0][values[0] > -math.inf].tolist()) for values, indices in (alone, mixed)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 20


def test_the_rehearsal_of_a_capture_leaves_no_trace(lm, random_codes, monkeypatch):
    """What a GPU does before it captures a frame as a graph, here before every frame."""
    requests = mixed_requests(random_codes)[:5]
    expected = Engine(lm, 3, context=300).generate(requests)
    frame = Engine._frame

    def rehearsed(engine: Engine, *arguments) -> None:
        monkeypatch.setattr(Engine, "_frame", frame)
        engine._rehearse(*arguments)
        frame(engine, *arguments)
        monkeypatch.setattr(Engine, "_frame", rehearsed)

    monkeypatch.setattr(Engine, "_frame", rehearsed)
    for result, plain in zip(Engine(lm, 3, context=300).generate(requests), expected, strict=True):
        assert torch.equal(result.codes, plain.codes)


def test_graphs_are_bounded_however_requests_sample(lm, random_codes, monkeypatch):
    """A GPU's way through :meth:`Engine._replay`, with calls in place of CUDA graphs."""
    monkeypatch.setattr("torchtitan.generation.engine.MAX_GRAPHS", 3)
    frame, captured = Engine._frame, []

    def capture(engine: Engine, *key: Any) -> Any:
        captured.append(key)
        return SimpleNamespace(replay=lambda: frame(engine, *key))

    monkeypatch.setattr(Engine, "_capture", capture)
    engine = Engine(lm, 2, context=300)
    samplings = [*(Sampling(top_k=k) for k in (17, 20, 30, 32, 33, 64)), GREEDY, Sampling(top_p=0.9, top_k=None)]
    # The graph that was not used for longest is dropped: that of 64 stays.
    for sampling in [*samplings, *(Sampling(top_k=k) for k in (64, 32, 64))]:
        request = Request(random_codes(4, 3), 3, sampling=sampling)
        (expected,) = Engine(lm, 2, context=300).generate([request])
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_frame", Engine._replay)
            (result,) = engine.generate([request])
        assert torch.equal(result.codes, expected.codes)
    assert [plan.most for _, _, plan in captured] == [32, 64, None, None, 32]
    assert len(engine._graphs) == 3


def test_rotary_scaling_that_depends_on_the_length(lm, random_codes):
    lm.model.config.max_position_embeddings = 300  # the cache has 384 positions
    lm.model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    lm.model.model.rotary_emb = type(lm.model.model.rotary_emb)(lm.model.config)
    prompt = random_codes(4, 30)
    (result,) = Engine(lm).generate([Request(prompt, 20, sampling=GREEDY)])
    expected = generate(lm, lm.stream.sample(prompt, end=False), 80, Constraint(lm.stream))
    assert lm.stream.encode(result.codes).tolist() == expected


def test_samples_do_not_depend_on_how_many_there_are(lm, random_codes):
    make_stops_likely(lm)
    prompt = random_codes(4, 3)
    together = continue_codes(lm, prompt, 30, HOT, num_samples=8)
    lengths = [result.codes.shape[1] for result in together]
    assert len(set(lengths)) > 2
    assert all(result.ended or length == 27 for result, length in zip(together, lengths, strict=True))
    for number in (1, 4):
        for alone, shared in zip(continue_codes(lm, prompt, 30, HOT, num_samples=number), together, strict=False):
            assert torch.equal(alone.codes, shared.codes)
            assert alone.ended == shared.ended


def test_a_row_that_comes_late_or_is_given_up_changes_nothing(lm, random_codes):
    requests = mixed_requests(random_codes)[:4]
    alone = [Engine(lm, context=300).generate([request])[0] for request in requests]
    engine = Engine(lm, rows=3, context=300)
    first = engine.submit(requests[0])
    given_up = engine.submit(Request(random_codes(4, 9), 50, sampling=HOT))
    for _ in range(4):
        engine.advance()
    others = [engine.submit(request) for request in requests[1:]]
    engine.cancel(given_up)
    while not engine.idle:
        engine.advance()
    assert given_up.finished
    assert len(given_up.frames) == 4
    for generation, expected in zip([first, *others], alone, strict=True):
        assert torch.equal(engine.continuation(generation).codes, expected.codes)


def test_seed_decides(lm, random_codes):
    prompt = random_codes(4, 4)

    def sample(seed: int, max_frames: int = 20) -> torch.Tensor:
        return continue_codes(lm, prompt, max_frames, Sampling(seed=seed))[0].codes

    assert torch.equal(sample(3), sample(3))
    assert not torch.equal(sample(3), sample(4))
    assert not torch.equal(sample(3), sample(3 + (1 << 32)))
    assert torch.equal(sample(3, 12), sample(3)[:, :8])


# Frames and ends


@pytest.mark.parametrize(("num_quantizers", "frames"), [(1, 300), (4, 300), (8, 100)])
def test_frames_are_whole(load, num_quantizers, frames):
    check_whole(load(num_quantizers), frames)


@pytest.mark.slow
@pytest.mark.parametrize("num_quantizers", [1, 4, 8])
def test_ten_thousand_frames_are_whole(load, num_quantizers):
    check_whole(load(num_quantizers), 3_400)


def check_whole(lm: SpeechLM, frames: int) -> None:
    """Frames at three temperatures are units in the order of their quantizers, and not always the same ones."""
    empty = torch.zeros(lm.stream.num_quantizers, 0, dtype=torch.int64)
    lm.model.lm_head.weight[lm.stream.audio_end_id] = 0  # sampled long, but not for ever
    engine = Engine(lm, rows=8, context=512)
    made, seen = 0, set()
    for number, temperature in enumerate(itertools.cycle([0.5, 1.0, 2.0])):
        sampling = Sampling(temperature=temperature, top_k=None)
        requests = [Request(empty, 50, sampling=sampling, sample=8 * number + i) for i in range(8)]
        generations = [engine.submit(request) for request in requests]
        while not engine.idle:
            engine.advance()
        for generation in generations:
            codes = engine.continuation(generation).codes  # decoding raises on anything but whole frames in order
            assert codes.shape[1] == len(generation.frames)
            assert generation.ended or codes.shape[1] == 50
            made += codes.shape[1]
            seen.update(codes.flatten().tolist())
        if made >= frames:
            break
    assert len(seen) > 200


def test_end_right_after_the_prompt(lm, random_codes):
    hidden = lm.model.model(lm.stream.sample(random_codes(4, 2), end=False)[None]).last_hidden_state[0, -1]
    lm.model.lm_head.weight.zero_()
    lm.model.lm_head.weight[lm.stream.audio_end_id] = hidden
    (result,) = continue_codes(lm, random_codes(4, 2), 10, GREEDY)
    assert result.codes.shape == (4, 0)
    assert result.ended


def test_a_broken_row_is_told_and_the_others_go_on(lm, random_codes):
    lm.model.model.embed_tokens.weight[lm.stream.encode(torch.tensor([[77]] * 4))[0]] = math.nan
    good, bad = random_codes(4, 3), torch.full((4, 3), 77)
    engine = Engine(lm, rows=2, context=100)
    first, second = engine.submit(Request(bad, 5)), engine.submit(Request(good, 5))
    third = engine.submit(Request(good, 5, sample=1))
    while not engine.idle:
        engine.advance()
    assert first.error is not None
    assert "not finite" in str(first.error)
    (expected,) = Engine(lm, context=100).generate([Request(good, 5)])
    assert torch.equal(engine.continuation(second).codes, expected.codes)
    assert third.error is None
    assert third.finished


# Contexts that fill up


def test_a_full_context_drops_its_older_half(lm, random_codes):
    """Against a plain loop that reads everything anew for each unit."""
    prompt, context, text = random_codes(4, 5), 45, text_prompt(lm, "hi")
    engine = Engine(lm, context=context)
    (result,) = engine.generate([Request(prompt, 40, text, GREEDY)])
    assert result.codes.shape[1] == 40
    prefix = lm.stream.sample(prompt[:, :0], text, end=False)
    units = lm.stream.encode(prompt)
    start = 0
    rule = Constraint(lm.stream, len(text))
    for _ in range(40):
        if prefix.numel() + units.numel() - start + 4 > context:
            start = units.numel() - (context - prefix.numel()) // 4 // 2 * 4
        for _ in range(4):
            ids = torch.cat([prefix, units[start:]])[None]
            units = torch.cat([units, rule(ids, lm.model(ids).logits[:, -1]).argmax(dim=1)])
    assert lm.stream.encode(result.codes).tolist() == units[20:].tolist()


def test_memory_does_not_grow_with_the_speech(lm):
    empty = torch.zeros(4, 0, dtype=torch.int64)
    engine = Engine(lm, context=100)
    generation = engine.submit(Request(empty, 500, sampling=HOT))
    shape = engine.llama.keys.shape
    while not engine.idle:
        engine.advance()
        assert generation.length <= 100
    assert len(generation.frames) == 500  # of which the context holds 24
    assert engine.llama.keys.shape == shape
    assert shape[3] == 128


@pytest.mark.slow
def test_ten_minutes_in_constant_memory(lm):
    """Speech that does not end, drawn and decoded as it comes; the process may not grow by more than its codes."""
    import resource

    engine = Engine(lm, context=1024)
    head = engine.heads[0]

    def never_ending(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)[:, : CODEBOOK_SIZE + 1]
        logits[:, CODEBOOK_SIZE] = -1e4
        return logits

    engine.heads[0] = never_ending
    request = Request(torch.zeros(4, 0, dtype=torch.int64), 7_500, sampling=HOT)
    samples, peaks = 0, []
    for piece in stream_speech(engine, request):
        samples += piece.numel()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert samples == 600 * 24_000
    assert peaks[-1] - peaks[len(peaks) // 4] < 20_000  # KiB


def test_alone_and_in_a_batch_with_a_full_context(lm, random_codes):
    requests = [Request(random_codes(4, n), 60, sampling=HOT, sample=n) for n in (0, 5, 17)]
    alone = [Engine(lm, context=80).generate([request])[0] for request in requests]
    together = Engine(lm, rows=3, context=80).generate(requests)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.codes, other.codes)


# Weights


def test_int8_weights_are_near_the_others(speech_model, random_codes):
    lm = SpeechLM.load(str(speech_model(4)), device="cpu", dtype="bfloat16")
    weight = lm.model.model.layers[0].mlp.down_proj.weight
    layer, x = Int8(weight, None), torch.randn(5, weight.shape[1]).bfloat16()
    exact = torch.nn.functional.linear(x.float(), weight.float())
    plain = torch.nn.functional.linear(x.float(), layer.weight.float() * layer.scale.float()[:, None])
    assert (plain - exact).norm() / exact.norm() < 0.01
    assert (layer(x).float() - plain).norm() / plain.norm() < 0.01
    assert layer.weight.dtype == torch.int8
    (result,) = Engine(lm, int8=True).generate([Request(random_codes(4, 3), 20)])
    assert result.codes.shape[1] == 20


@pytest.mark.skipif(find_spec("triton") is None, reason="torch of this kind comes without Triton")
def test_the_int8_kernel_of_gpus():
    """Its arithmetic in Triton's interpreter (in fp16, since NumPy has no bf16), and that it compiles for GPUs."""
    program = """
import torch, triton
from torchtitan.generation import int8_kernel
from torchtitan.generation.linear import widened
torch.manual_seed(0)
for rows, outputs, inputs in ((1, 48, 64), (3, 520, 256), (17, 40, 200)):
    x, weight = torch.randn(rows, inputs).half(), torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scale = (torch.rand(outputs) / 100).half()
    exact = widened(x.double(), weight, scale.double())
    found = int8_kernel.multiply(x, weight, scale)
    assert found.dtype == torch.float16 and found.shape == (rows, outputs)
    assert (found.double() - exact).norm() / exact.norm() < 1e-3
    assert torch.equal(int8_kernel.multiply(x[:1], weight, scale), found[:1])
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torchtitan.generation import int8_kernel

    kinds = {"x": "*bf16", "weight": "*i8", "scale": "*bf16", "out": "*bf16", "rows": "i32", "outputs": "i32"}
    constants = {"inputs": 2048, "block_rows": 16, "block_outputs": 32, "block_inputs": 128}
    source = ASTSource(int8_kernel._kernel, {**kinds, **dict.fromkeys(constants, "constexpr")}, constants)
    assert "mma" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@pytest.mark.parametrize(
    ("product", "agrees"),
    [(torch._weight_int8pack_mm, True), (lambda *given: 1.1 * widened(*given), False), (lambda *_: 1 / 0, False)],
)
def test_a_fast_int8_product_is_tried_before_it_is_used(product, agrees):
    assert _agrees(product, torch.device("cpu"), torch.bfloat16) == agrees


def test_consumed_weights_are_not_in_memory_twice(lm, random_codes):
    (expected,) = Engine(lm).generate([Request(random_codes(4, 3), 5)])
    engine = Engine(lm, consume=True)
    assert sum(p.numel() for layer in lm.model.model.layers for p in layer.parameters() if p.dim() == 2) == 0
    (result,) = engine.generate([Request(random_codes(4, 3), 5)])
    assert torch.equal(result.codes, expected.codes)


@pytest.mark.slow
def test_compiled_layers_give_the_same(lm, random_codes):
    requests = mixed_requests(random_codes)[:4]
    plain = Engine(lm, 2, context=300).generate(requests)
    compiled = Engine(lm, 2, context=300, compile_layers=True).generate(requests)
    for one, other in zip(plain, compiled, strict=True):
        assert torch.equal(one.codes, other.codes)


# Listening


def test_the_stream_is_the_whole_decode(lm, random_codes):
    prompt = random_codes(4, 6)
    (result,) = Engine(lm, context=200).generate([Request(prompt, 20, sampling=HOT)])
    whole = lm.codec.decode(torch.cat([prompt, result.codes], dim=1))
    for chunk_frames in (1, 3, 50):
        pieces = list(stream_speech(Engine(lm, context=200), Request(prompt, 20, sampling=HOT), True, chunk_frames))
        assert (torch.cat(pieces) - whole).norm() / whole.norm() < 1e-5
        new = list(stream_speech(Engine(lm, context=200), Request(prompt, 20, sampling=HOT), False, chunk_frames))
        assert (torch.cat(new) - whole[6 * 1920 :]).norm() / whole.norm() < 1e-5


def test_listeners_do_not_disturb_each_other(lm, random_codes):
    requests = mixed_requests(random_codes)[:5]
    expected = [torch.cat(list(stream_speech(Engine(lm, context=300), request))) for request in requests]
    heard: dict[int, torch.Tensor] = {}
    with SpeechService(Engine(lm, rows=2, context=300)) as service:

        def listen(i: int) -> None:
            heard[i] = torch.cat(list(service.listen(service.submit(requests[i]))))

        threads = [threading.Thread(target=listen, args=(i,)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    for i in range(5):
        assert heard[i].shape == expected[i].shape
        assert (heard[i] - expected[i]).abs().max() < 1e-4


def test_who_stops_listening_frees_the_row(lm, random_codes):
    with SpeechService(Engine(lm, rows=1, context=1000)) as service:
        long = service.submit(Request(random_codes(4, 3), 240, sampling=HOT))
        stream = service.listen(long)
        next(stream)
        stream.close()
        assert long.finished
        short = list(service.listen(service.submit(Request(random_codes(4, 3), 4, sampling=HOT)), prompt=False))
    assert sum(piece.numel() for piece in short) == 4 * 1920


def test_a_service_that_is_closed_tells_its_listener(lm, random_codes):
    service = SpeechService(Engine(lm, context=1000))
    stream = service.listen(service.submit(Request(random_codes(4, 3), 240, sampling=HOT)))
    next(stream)
    service.close()
    with pytest.raises(UserError, match="being stopped"):
        list(stream)
    with pytest.raises(UserError, match="no more speech"):
        service.submit(Request(random_codes(4, 3), 4))


def test_an_engine_that_fails_tells_its_listeners(lm, random_codes, monkeypatch):
    engine = Engine(lm, context=1000)
    with SpeechService(engine) as service:
        stream = service.listen(service.submit(Request(random_codes(4, 3), 240, sampling=HOT)))
        next(stream)
        monkeypatch.setattr(engine.llama, "step", lambda *_: 1 / 0)
        with pytest.raises(UserError, match=r"generation failed .ZeroDivisionError"):
            list(stream)
        with pytest.raises(UserError, match="no more speech"):
            service.submit(Request(random_codes(4, 3), 4))


def test_a_request_that_fails_when_it_gets_its_row_tells_its_listener(lm, random_codes, monkeypatch):
    engine = Engine(lm, context=1000)
    monkeypatch.setattr(engine.llama, "prefill", lambda *_: 1 / 0)
    service = SpeechService(engine)
    generation = service.submit(Request(random_codes(4, 3), 4))
    deadline = time.monotonic() + 10  # a request that was forgotten would be waited for without end
    while service._failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    service.close()
    assert generation.finished
    assert "ZeroDivisionError" in str(generation.error)


def test_an_error_reaches_the_listener(lm, random_codes):
    lm.model.lm_head.weight[lm.stream.base_size + 3] = math.nan
    with SpeechService(Engine(lm, context=100)) as service, pytest.raises(UserError, match="not finite"):
        list(service.listen(service.submit(Request(random_codes(4, 2), 5))))


# Refused


def test_requests_that_cannot_be(lm, random_codes):
    engine = Engine(lm, context=40)
    with pytest.raises(UserError, match="leaves no room"):
        engine.submit(Request(random_codes(4, 9), 5))
    with pytest.raises(UserError, match="at least one"):
        engine.submit(Request(random_codes(4, 2), 0))
    with pytest.raises(ValueError, match="2047"):
        engine.submit(Request(torch.full((4, 1), 2048), 5))
    with pytest.raises(ValueError, match="must be"):
        engine.submit(Request(random_codes(3, 2), 5))
    with pytest.raises(UserError, match="context holds"):
        Engine(lm, context=5000)
    with pytest.raises(UserError, match="1 or more"):
        Engine(lm, rows=0)
    lm.model.config.model_type = "mistral"
    with pytest.raises(UserError, match="Llama is needed"):
        Engine(lm)


def test_a_text_may_have_an_exclamation_mark(lm):
    """The published models pad with it, which makes transformers call it special."""
    lm.tokenizer.pad_token = "!"
    assert lm.tokenizer.pad_token_id in lm.tokenizer.all_special_ids
    assert lm.tokenizer.pad_token_id in text_prompt(lm, "Stop!")
    with pytest.raises(UserError, match="text to speak contains the name of a special token"):
        text_prompt(lm, f"Stop!{lm.tokenizer.eos_token}")


@pytest.mark.parametrize("text", ["", "say <3_1> now", "<audio>", "<|end_of_text|>"])
def test_texts_that_cannot_be_spoken(lm, text):
    with pytest.raises(UserError, match="text to speak"):
        text_prompt(lm, text)
