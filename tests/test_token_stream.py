"""The token stream: ids by arithmetic, checked against real tokenizers."""

import pytest
import torch

from torchtitan.audio.token_stream import (
    CODEBOOK_SIZE,
    TokenStream,
    TokenStreamError,
    extend_tokenizer,
    quantizers_in,
)

LLAMA3 = TokenStream(base_size=128_256, num_quantizers=4, bos_id=128_000)
SMALL = TokenStream(base_size=258, num_quantizers=2, bos_id=256)


def random_codes(num_quantizers: int, frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(CODEBOOK_SIZE, (num_quantizers, frames), generator=torch.Generator().manual_seed(seed))


def strings_of(stream: TokenStream, codes: torch.Tensor) -> str:
    """A sample without BOS, written the slow way."""
    units = "".join(f"<{code}_{q}>" for frame in codes.T.tolist() for q, code in enumerate(frame))
    return f"<audio>{units}</audio>"


# --- arithmetic


def test_ids_of_the_published_models():
    codes = torch.zeros(4, 2, dtype=torch.int64)
    codes[0, 0], codes[3, 1] = 1049, 1620
    ids = LLAMA3.encode(codes)
    assert (ids[0], ids[7]) == (132_452, 134_739)
    assert (LLAMA3.audio_start_id, LLAMA3.audio_end_id, LLAMA3.vocab_size) == (136_448, 136_449, 136_450)


def test_token_strings_are_code_major():
    tokens = SMALL.token_strings()
    assert tokens[:5] == ["<0_0>", "<0_1>", "<1_0>", "<1_1>", "<2_0>"]
    assert tokens[-3:] == ["<2047_1>", "<audio>", "</audio>"]
    assert len(tokens) == SMALL.vocab_size - SMALL.base_size


@pytest.mark.parametrize("num_quantizers", range(1, 33))
def test_decode_inverts_encode(num_quantizers):
    stream = TokenStream(300, num_quantizers, 0)
    codes = random_codes(num_quantizers, 9)
    codes[:, 0], codes[:, 1] = 0, CODEBOOK_SIZE - 1
    ids = stream.encode(codes)
    assert ids.shape == (9 * num_quantizers,)
    assert ids.dtype == torch.int64
    assert torch.equal(stream.decode(ids), codes)


def test_frames_lie_side_by_side():
    codes = torch.tensor([[5, 7], [6, 8]])
    assert SMALL.encode(codes).tolist() == [258 + 10, 258 + 13, 258 + 14, 258 + 17]


def test_int16_codes_do_not_overflow():
    codes = torch.full((4, 1), 2047, dtype=torch.int16)
    assert LLAMA3.encode(codes).tolist() == [136_444, 136_445, 136_446, 136_447]


def test_no_frames():
    assert SMALL.decode(SMALL.encode(torch.zeros(2, 0, dtype=torch.int64))).shape == (2, 0)


@pytest.mark.parametrize("shape", [(3, 5), (2,), (1, 2, 5)])
def test_encode_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\[2, T\]"):
        SMALL.encode(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([258], "whole number of frames"),
        ([259, 258], "order of their quantizers"),
        ([258, 258], "order of their quantizers"),
        ([256, 259], "order of their quantizers"),
        ([SMALL.audio_start_id, SMALL.audio_end_id], "order of their quantizers"),
    ],
)
def test_decode_refuses_what_is_not_whole_frames_in_order(ids, reason):
    with pytest.raises(ValueError, match=reason):
        SMALL.decode(torch.tensor(ids))


def test_kinds_of_ids():
    ids = torch.tensor([[256, SMALL.audio_start_id, 258], [259, SMALL.audio_start_id - 1, SMALL.audio_end_id]])
    assert SMALL.is_unit(ids).tolist() == [[False, False, True], [True, True, False]]
    assert SMALL.quantizer_of(ids).tolist() == [[-1, -1, 0], [1, 1, -1]]


# --- samples


def test_sample_of_task_a2a():
    codes = torch.tensor([[5], [6]])
    expected = [256, SMALL.audio_start_id, 258 + 10, 258 + 13, SMALL.audio_end_id]
    assert SMALL.sample(codes).tolist() == expected


def test_sample_of_task_tts():
    codes = torch.tensor([[5], [6]])
    expected = [256, 104, 105, SMALL.audio_start_id, 258 + 10, 258 + 13, SMALL.audio_end_id]
    assert SMALL.sample(codes, [104, 105]).tolist() == expected


def test_sample_without_its_end_is_a_prompt():
    codes = random_codes(2, 3)
    assert torch.equal(SMALL.sample(codes, end=False), SMALL.sample(codes)[:-1])


def test_length_of_twenty_seconds():
    assert LLAMA3.sample(random_codes(4, 250)).numel() == 1003


@pytest.mark.parametrize(
    ("length", "num_text", "frames"), [(1024, 0, 255), (1003, 0, 250), (1002, 0, 249), (1024, 21, 250), (3, 0, 0)]
)
def test_max_frames(length, num_text, frames):
    assert LLAMA3.max_frames(length, num_text) == frames


def test_max_frames_is_never_negative():
    assert LLAMA3.max_frames(10, 100) == 0


# --- tokenizers


@pytest.mark.parametrize("num_quantizers", [1, 2, 4])
def test_tokenized_strings_are_the_ids_of_the_arithmetic(make_tokenizer, num_quantizers):
    tokenizer = make_tokenizer()
    stream = extend_tokenizer(tokenizer, num_quantizers)
    codes = random_codes(num_quantizers, 20)
    ids = tokenizer(strings_of(stream, codes), add_special_tokens=False)["input_ids"]
    assert [tokenizer.bos_token_id, *ids] == stream.sample(codes).tolist()


def test_audio_tokens_follow_the_last_id_of_the_base(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    stream = extend_tokenizer(tokenizer, 1)
    assert (stream.base_size, stream.bos_id, len(tokenizer)) == (259, 256, stream.vocab_size)


def test_extending_twice_changes_nothing(make_tokenizer):
    tokenizer = make_tokenizer()
    first = extend_tokenizer(tokenizer, 2)
    assert extend_tokenizer(tokenizer, 2) == first
    assert len(tokenizer) == first.vocab_size


def test_audio_tokens_are_not_special(make_tokenizer):
    tokenizer = make_tokenizer()
    stream = extend_tokenizer(tokenizer, 1)
    codes = random_codes(1, 3)
    decoded = tokenizer.decode(stream.sample(codes).tolist(), skip_special_tokens=True)
    assert decoded == strings_of(stream, codes)


def test_layout_is_read_off_a_saved_tokenizer(make_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer()
    stream = extend_tokenizer(tokenizer, 2)
    tokenizer.save_pretrained(tmp_path)
    assert TokenStream.from_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == stream


def test_quantizers_in(make_tokenizer):
    tokenizer = make_tokenizer()
    assert quantizers_in(tokenizer) == 0
    extend_tokenizer(tokenizer, 2)
    assert quantizers_in(tokenizer) == 2


def test_base_tokenizer_has_no_layout(make_tokenizer):
    with pytest.raises(TokenStreamError, match="no audio tokens"):
        TokenStream.from_tokenizer(make_tokenizer())


@pytest.mark.parametrize("function", [TokenStream.from_tokenizer, extend_tokenizer])
def test_other_number_of_quantizers_is_named(make_tokenizer, function):
    tokenizer = make_tokenizer()
    extend_tokenizer(tokenizer, 2)
    with pytest.raises(TokenStreamError, match="for 2 quantizers, not 4"):
        function(tokenizer, 4)


@pytest.mark.parametrize("num_quantizers", [-1, 0, 33])
def test_impossible_number_of_quantizers(make_tokenizer, num_quantizers):
    with pytest.raises(TokenStreamError, match=f"1 to 32, not {num_quantizers}"):
        extend_tokenizer(make_tokenizer(), num_quantizers)


def test_gap_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    tokens = SMALL.token_strings()
    tokenizer.add_tokens([*tokens[:100], "<gap>", *tokens[100:]])
    with pytest.raises(TokenStreamError, match="<50_0> at id 359 where the token stream needs 358"):
        TokenStream.from_tokenizer(tokenizer)


def test_missing_token_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(SMALL.token_strings()[:-1])
    with pytest.raises(TokenStreamError, match="</audio> at id None"):
        TokenStream.from_tokenizer(tokenizer)


def test_quantizer_major_order_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    units = [f"<{code}_{q}>" for q in range(2) for code in range(CODEBOOK_SIZE)]
    tokenizer.add_tokens([*units, "<audio>", "</audio>"])
    with pytest.raises(TokenStreamError, match="not one block ordered by code, then quantizer"):
        TokenStream.from_tokenizer(tokenizer)


def test_marks_before_the_units_are_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    tokens = SMALL.token_strings()
    tokenizer.add_tokens([*tokens[-2:], *tokens[:-2]])
    with pytest.raises(TokenStreamError, match="<audio> at id 258"):
        TokenStream.from_tokenizer(tokenizer)


def test_tokenizer_without_bos_is_refused(make_tokenizer):
    with pytest.raises(TokenStreamError, match="no BOS"):
        extend_tokenizer(make_tokenizer(bos=False), 1)
