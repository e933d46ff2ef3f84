"""The codec: the codes of a lone transformers call, whatever the batch, the length and the chunking."""

import shutil

import pytest
import torch
import torch.nn.functional as F

import torchtitan.audio.codec as codec_module
from torchtitan.audio.codec import FRAME_SIZE, Codec, CodecError

RATE = 24_000
LENGTHS = [1, 100, 1919, 1920, 1921, 5000, 24_000, 26 * 1920, 3 * RATE + 7, 12 * RATE + 333]


@pytest.fixture(scope="module")
def load_mimi(mimi_folder):
    """A function that loads a fresh transformers model."""
    from transformers import MimiModel

    def load(**settings):
        return MimiModel.from_pretrained(mimi_folder, dtype=torch.float32, **settings).eval()

    return load


@pytest.fixture(scope="module")
def mimi(load_mimi):
    return load_mimi()


@pytest.fixture(scope="module")
def mimi_full(load_mimi):
    """The model that attends over everything."""
    return load_mimi(sliding_window=1 << 30)


@pytest.fixture(scope="module")
def clips():
    torch.manual_seed(0)
    return {n: 0.3 * torch.randn(n) for n in LENGTHS}


@pytest.fixture
def batches(monkeypatch):
    """Make the CPU encode in batches as a GPU does."""
    monkeypatch.setitem(codec_module.BATCH_SECONDS, "cpu", 1000.0)
    monkeypatch.setattr(codec_module, "CPU_CHUNK_SECONDS", codec_module.CHUNK_SECONDS)


def lone(mimi, waveform: torch.Tensor, num_quantizers: int = 4) -> torch.Tensor:
    """Codes [Q, T] of transformers alone."""
    with torch.no_grad():
        return mimi.encode(waveform[None, None], num_quantizers=num_quantizers).audio_codes[0]


def assert_same_codes(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, but for one near-tie in a thousand codes, which is not in the last frame."""
    assert found.shape == expected.shape
    assert torch.equal(found[:, -1], expected[:, -1])
    assert (found != expected).sum().item() <= expected.numel() // 1000


def aligned(waveform: torch.Tensor) -> torch.Tensor:
    return F.pad(waveform, (0, -waveform.numel() % FRAME_SIZE))


# --- conventions


@pytest.mark.parametrize("length", LENGTHS)
def test_exact_equals_a_lone_call(codec, mimi, clips, length):
    (found,) = codec.encode([clips[length]])
    assert_same_codes(found, lone(mimi, clips[length]))


def test_exact_is_the_same_inside_a_batch(codec, mimi, clips, batches):
    for n, found in zip(LENGTHS, codec.encode(list(clips.values())), strict=True):
        assert_same_codes(found, lone(mimi, clips[n]))


@pytest.mark.parametrize("length", LENGTHS)
def test_aligned_equals_a_lone_call_on_the_padded_clip(load_mimi, mimi, clips, length):
    (found,) = Codec(load_mimi(), 4, padding="aligned").encode([clips[length]])
    assert_same_codes(found, lone(mimi, aligned(clips[length])))


def test_aligned_is_the_same_inside_a_batch(load_mimi, mimi, clips, batches):
    found = Codec(load_mimi(), 4, padding="aligned").encode(list(clips.values()))
    for n, codes in zip(LENGTHS, found, strict=True):
        assert_same_codes(codes, lone(mimi, aligned(clips[n])))


def test_exact_and_aligned_differ_in_the_last_frame_only(mimi, clips):
    exact, padded = lone(mimi, clips[24_000]), lone(mimi, aligned(clips[24_000]))
    assert torch.equal(exact[:, :-1], padded[:, :-1])
    assert not torch.equal(exact[:, -1], padded[:, -1])


def test_window_full_equals_a_lone_call_that_attends_over_everything(load_mimi, mimi_full, clips):
    clip = clips[12 * RATE + 333]
    (found,) = Codec(load_mimi(), 4, window="full").encode([clip])
    assert_same_codes(found, lone(mimi_full, clip))


def test_windows_differ_after_ten_seconds_only(codec, load_mimi, clips):
    clip = clips[12 * RATE + 333]
    own, full = codec.encode([clip])[0], Codec(load_mimi(), 4, window="full").encode([clip])[0]
    assert torch.equal(own[:, :125], full[:, :125])
    assert not torch.equal(own, full)


def test_order_and_repetition_of_clips_do_not_matter(codec, clips, batches):
    chosen = [1921, 1, 24_000, 1921, 100]
    for n, codes in zip(chosen, codec.encode([clips[n] for n in chosen]), strict=True):
        assert_same_codes(codes, codec.encode([clips[n]])[0])


def test_batches_stay_within_the_budget(codec, batches, monkeypatch):
    monkeypatch.setitem(codec_module.BATCH_SECONDS, "cpu", 3.0)
    lengths = [RATE, 25 * RATE, RATE // 2, RATE, 2 * RATE, 30 * RATE]
    batches = codec._batches(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 3 * RATE
    assert len(batches) < 6


def test_a_batch_that_the_memory_does_not_hold_is_encoded_in_parts(codec, batches, clips, monkeypatch):
    latents, sizes = codec._latents, []

    def small_memory(x: torch.Tensor, *more):
        sizes.append(x.shape[0])
        if x.shape[0] > 2:
            raise torch.OutOfMemoryError
        return latents(x, *more)

    chosen = [clips[n] for n in LENGTHS[:5]]
    expected = [codec.encode([clip])[0] for clip in chosen]
    monkeypatch.setattr(codec, "_latents", small_memory)
    for found, codes in zip(codec.encode(chosen), expected, strict=True):
        assert_same_codes(found, codes)
    assert sizes == [5, 2, 3, 1, 2]
    monkeypatch.setattr(codec, "_latents", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        codec.encode(chosen)


def test_no_clips(codec):
    assert codec.encode([]) == []


@pytest.mark.parametrize("num_quantizers", [1, 2, 8])
def test_fewer_quantizers_are_the_first_of_more(load_mimi, mimi, clips, num_quantizers):
    (found,) = Codec(load_mimi(), num_quantizers).encode([clips[5000]])
    assert_same_codes(found, lone(mimi, clips[5000], 8)[:num_quantizers])


@pytest.mark.parametrize("num_samples", [1, 1919, 1920, 1921, (1 << 24) + 1, 3600 * RATE])
def test_number_of_frames_is_exact_at_any_length(codec, num_samples):
    whole, rest = divmod(num_samples, FRAME_SIZE)
    assert codec.num_frames(num_samples) == whole + (rest > 0)


# --- long clips


@pytest.fixture
def chunks(monkeypatch):
    """A function that sets the length of chunks, in seconds; it returns the numbers of samples of the chunks made."""
    made: list[int] = []
    latents = Codec._latents

    def recorded(self, x, lengths, state):
        made.extend(lengths)
        return latents(self, x, lengths, state)

    def set_length(seconds: float) -> list[int]:
        monkeypatch.setattr(codec_module, "CHUNK_SECONDS", seconds)
        monkeypatch.setattr(codec_module, "CPU_CHUNK_SECONDS", seconds)
        made.clear()
        return made

    monkeypatch.setattr(Codec, "_latents", recorded)
    return set_length


@pytest.mark.parametrize("length", [8 * RATE + 1, 8 * RATE, 12 * RATE + 333])
@pytest.mark.parametrize("padding", ["exact", "aligned"])
def test_chunks_equal_the_whole(load_mimi, chunks, padding, length):
    codec = Codec(load_mimi(), 4, padding)
    torch.manual_seed(length)
    clip = 0.3 * torch.randn(length)
    made = chunks(20)
    (whole,) = codec.encode([clip])
    assert len(made) == 1
    made = chunks(4)
    (chunked,) = codec.encode([clip])
    assert len(made) > 1
    assert_same_codes(chunked, whole)


FRAMES = 13 * FRAME_SIZE  # about a second


@pytest.mark.parametrize("length", [2 * FRAMES - 1, 2 * FRAMES, 2 * FRAMES + 1, 3 * FRAMES - 1919, 11 * FRAMES + 1])
@pytest.mark.parametrize("window", ["codec", "full"])
@pytest.mark.parametrize("padding", ["exact", "aligned"])
def test_short_chunks_equal_a_lone_call(load_mimi, mimi, mimi_full, chunks, padding, window, length):
    torch.manual_seed(length)
    clip = 0.3 * torch.randn(length)
    made = chunks(FRAMES / RATE)
    (found,) = Codec(load_mimi(), 4, padding, window).encode([clip])
    assert sum(made) == length
    assert len(made) >= length // FRAMES  # or else the next line proves nothing
    assert max(made) <= FRAMES
    whole = aligned(clip) if padding == "aligned" else clip
    assert_same_codes(found, lone(mimi_full if window == "full" else mimi, whole))


@pytest.mark.parametrize("more", [(1, 1), (0, 1), (1919, 5000), (3 * RATE, 7 * RATE + 5)])
@pytest.mark.parametrize("window", ["codec", "full"])
@pytest.mark.parametrize("padding", ["exact", "aligned"])
def test_a_common_beginning_is_encoded_once_and_changes_no_code(load_mimi, padding, window, more, monkeypatch):
    monkeypatch.setattr(codec_module, "CPU_CHUNK_SECONDS", 1)
    codec = Codec(load_mimi(), 4, padding, window)
    torch.manual_seed(sum(more))
    shared = 0.3 * torch.randn(13 * FRAME_SIZE + 700)
    clips = [torch.cat((shared, 0.3 * torch.randn(n))) for n in more]
    expected = [codec.encode([clip])[0] for clip in clips]
    encoded: list[int] = []
    latents = codec._latents
    monkeypatch.setattr(codec, "_latents", lambda x, *rest: encoded.append(x.shape[-1]) or latents(x, *rest))
    for codes, wanted in zip(codec.encode_pair(*clips), expected, strict=True):
        assert_same_codes(codes, wanted)
    assert sum(encoded) == sum(map(len, clips)) - 13 * FRAME_SIZE


def test_equal_clips_are_encoded_once_and_others_apart(codec, monkeypatch):
    torch.manual_seed(0)
    one, other = 0.3 * torch.randn(2, 30_000)
    encode, encoded = codec.encode, []
    monkeypatch.setattr(codec, "encode", lambda clips: encoded.append(len(clips)) or encode(clips))
    first, second = codec.encode_pair(one, one.clone())
    assert torch.equal(first, second)
    first, second = codec.encode_pair(one, other)
    assert_same_codes(second, encode([other])[0])
    assert encoded == [1, 2]


def test_cpu_takes_chunks_of_about_the_best_length(codec, chunks):
    made = chunks(20)
    for seconds in (1, 5.9, 6.1, 11, 30):
        made.clear()
        codec_module.CPU_CHUNK_SECONDS = 4  # the fixture restores it
        codec.encode([torch.zeros(round(seconds * RATE))])
        assert len(made) == max(1, round(seconds / 4))
        assert max(made) - min(made) < FRAME_SIZE * len(made)
        assert max(made) <= 6 * RATE


def test_chunks_equal_the_whole_with_the_full_window(load_mimi, mimi_full, clips, monkeypatch):
    monkeypatch.setattr(codec_module, "CHUNK_SECONDS", 4)
    clip = clips[12 * RATE + 333]
    (chunked,) = Codec(load_mimi(), 4, window="full").encode([clip])
    assert_same_codes(chunked, lone(mimi_full, clip))


def test_long_and_short_clips_together(codec, mimi, clips, batches, monkeypatch):
    monkeypatch.setattr(codec_module, "CHUNK_SECONDS", 4)
    chosen = [100, 12 * RATE + 333, 24_000]
    for n, codes in zip(chosen, codec.encode([clips[n] for n in chosen]), strict=True):
        assert_same_codes(codes, lone(mimi, clips[n]))


def test_clip_too_long_for_the_full_window_is_refused(load_mimi, clips, monkeypatch):
    monkeypatch.setattr(codec_module, "CHUNK_SECONDS", 4)
    monkeypatch.setattr(codec_module, "FULL_WINDOW_MAX_SECONDS", 10)
    with pytest.raises(CodecError, match="12 s is too long for the full attention window"):
        Codec(load_mimi(), 4, window="full").encode([clips[12 * RATE + 333]])


# --- decoding


def test_decode_equals_transformers(codec, mimi, clips):
    codes = lone(mimi, clips[3 * RATE + 7])
    with torch.no_grad():
        expected = mimi.decode(codes[None]).audio_values[0, 0]
    found = codec.decode(codes)
    assert found.shape == (FRAME_SIZE * codes.shape[1],)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)


def test_decode_uses_the_codecs_own_window_whatever_the_encoders(load_mimi, mimi, mimi_full, clips):
    codes = lone(mimi, clips[12 * RATE + 333])
    with torch.no_grad():
        expected = mimi.decode(codes[None]).audio_values[0, 0]
        other = mimi_full.decode(codes[None]).audio_values[0, 0]
    assert not torch.allclose(expected, other, atol=0.1)  # or else the next line proves nothing
    assert torch.allclose(Codec(load_mimi(), 4, window="full").decode(codes), expected, atol=1e-5)


def test_decode_of_no_frames(codec):
    assert codec.decode(torch.zeros(4, 0, dtype=torch.int64)).shape == (0,)


# --- fingerprint


def test_fingerprint_is_that_of_the_weights_wherever_they_lie(codec, mimi_folder, tmp_path):
    shutil.copytree(mimi_folder, tmp_path / "copy")
    assert Codec.load(tmp_path / "copy", 4).fingerprint() == codec.fingerprint()


def test_fingerprint_leaves_out_what_codes_do_not_depend_on(load_mimi, codec):
    model = load_mimi()
    for parameter in [
        *model.decoder.parameters(),
        model.quantizer.acoustic_residual_vector_quantizer.output_proj.weight,
    ]:
        parameter.data.zero_()
    model.quantizer.acoustic_residual_vector_quantizer.layers[3].codebook.embed_sum.zero_()  # the fifth of all
    assert Codec(model, 4, "aligned", "full").fingerprint() == codec.fingerprint()


@pytest.mark.parametrize(
    "part",
    [
        "quantizer.semantic_residual_vector_quantizer.input_proj.weight",
        "quantizer.acoustic_residual_vector_quantizer.input_proj.weight",
        "quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum",
        "quantizer.acoustic_residual_vector_quantizer.layers.2.codebook.cluster_usage",
        "_seanet.layers.0.conv.weight",
        "_seanet.layers.0.conv.bias",
        "_transformer.layers.1.self_attn.q_proj.weight",
        "_transformer.layers.1.mlp_layer_scale.scale",
        "_downsample.conv.weight",
    ],
)
def test_fingerprint_covers_every_part(load_mimi, codec, part):
    changed = Codec(load_mimi(), 4)
    root, _, rest = part.partition(".")
    tensor = getattr(changed, root) if root.startswith("_") else getattr(changed.model, root)
    for name in rest.split("."):
        tensor = getattr(tensor, name)
    tensor.data.view(-1)[0] += 1.5
    assert changed.fingerprint() != codec.fingerprint()


def test_fingerprint_covers_settings(load_mimi, codec):
    assert Codec(load_mimi(sliding_window=100), 4).fingerprint() != codec.fingerprint()
    assert Codec(load_mimi(), 3).fingerprint() != codec.fingerprint()


# --- loading


def test_conventions_are_told(mimi_folder):
    codec = Codec.load(mimi_folder, 4, "aligned", "full", resampler="soxr_hq")
    expected = {"audio_tokenizer": str(mimi_folder), "codec_padding": "aligned", "codec_window": "full"}
    expected["resampler"] = "soxr_hq"
    assert codec.conventions() == expected


def test_stored_bf16_weights_are_computed_in_fp32(mimi_folder, tmp_path):
    from transformers import MimiModel

    MimiModel.from_pretrained(mimi_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in Codec.load(tmp_path, 4).model.parameters()} == {torch.float32}


@pytest.mark.parametrize("waveform", [torch.zeros(0), torch.zeros(1, 100)])
def test_what_is_no_waveform_is_refused(codec, waveform):
    with pytest.raises(CodecError, match=r"must be \[n\] with n >= 1"):
        codec.encode([torch.zeros(10), waveform])


def test_untrained_codebooks_are_refused(load_mimi):
    model = load_mimi()
    for module in model.modules():
        if hasattr(module, "embed_sum"):
            module.embed_sum.zero_()
    with pytest.raises(CodecError, match="codebooks are all zero"):
        Codec(model, 4)


def test_lower_precision_is_refused(load_mimi):
    with pytest.raises(CodecError, match="must be in fp32"):
        Codec(load_mimi().bfloat16(), 4)


@pytest.mark.parametrize("num_quantizers", [0, 9])
def test_impossible_number_of_quantizers_is_refused(load_mimi, num_quantizers):
    with pytest.raises(CodecError, match=f"{num_quantizers} quantizers were asked of a codec that has 8"):
        Codec(load_mimi(), num_quantizers)


@pytest.mark.parametrize("setting", ["padding", "window"])
def test_unknown_convention_is_refused(load_mimi, setting):
    with pytest.raises(CodecError, match=f"codec_{setting} must be one of .*, not 'other'"):
        Codec(load_mimi(), 4, **{setting: "other"})


@pytest.mark.parametrize(("key", "value"), [("codebook_size", 1024), ("sampling_rate", 16_000)])
def test_codec_of_another_kind_is_refused(load_mimi, key, value):
    model = load_mimi()
    setattr(model.config, key, value)
    with pytest.raises(CodecError, match=f"2048 codes, not .*{value}"):
        Codec(model, 4)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(CodecError, match="no codec could be loaded from there"):
        Codec.load(tmp_path / "missing", 4)


def test_folder_of_another_model_is_refused(make_base_model):
    with pytest.raises(CodecError, match="a Mimi codec is needed, this is a llama model"):
        Codec.load(make_base_model(), 4)


def test_folder_without_weights_is_refused(mimi_folder, tmp_path):
    shutil.copy(mimi_folder / "config.json", tmp_path)
    with pytest.raises(CodecError, match="no codec could be loaded from there"):
        Codec.load(tmp_path, 4)


def test_cut_off_weights_are_refused(mimi_folder, tmp_path):
    shutil.copytree(mimi_folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CodecError, match="no codec could be loaded from there"):
        Codec.load(tmp_path, 4)
