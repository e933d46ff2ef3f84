"""Serving: the constraint that vLLM calls, without vLLM, and the client against a server of its own."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import soundfile
import torch

from scripts import serve_client
from scripts.vllm_frames import FrameConstraint, FrameProcessor, Layout
from torchtitan.audio.token_stream import CODEBOOK_SIZE, TokenStream, extend_tokenizer
from torchtitan.audio.waveform import load_audio
from torchtitan.tools.errors import UserError

BASE = 300  # ids before the audio tokens


def stream_of(num_quantizers: int) -> TokenStream:
    return TokenStream(BASE, num_quantizers, 1)


def units(num_quantizers: int, count: int) -> list[int]:
    """The first units of some frames, in order."""
    return [BASE + (37 * i % CODEBOOK_SIZE) * num_quantizers + i % num_quantizers for i in range(count)]


def allowed(constraint: FrameConstraint, rows: int) -> list[set[int]]:
    """The ids that may come in each row of a batch."""
    size = constraint.layout.audio_end_id + 5  # a vocabulary that is padded
    logits = torch.randn(rows, size)
    before = logits.clone()
    result = constraint.apply(logits)
    kept = result != -math.inf
    assert torch.equal(result[kept], before[kept])
    return [set(row.nonzero()[:, 0].tolist()) for row in kept]


def expected(num_quantizers: int, count: int) -> set[int]:
    """What may come after ``count`` units, id by id."""
    stream = stream_of(num_quantizers)
    ids = set()
    for token in range(stream.audio_end_id + 5):
        if stream.base_size <= token < stream.audio_start_id:
            if (token - stream.base_size) % num_quantizers == count % num_quantizers:
                ids.add(token)
        elif token == stream.audio_end_id and count % num_quantizers == 0:
            ids.add(token)
    return ids


@pytest.mark.parametrize("num_quantizers", [1, 2, 4, 8, 32])
def test_only_the_units_whose_turn_it_is_may_come(num_quantizers):
    constraint = FrameConstraint(Layout(BASE, num_quantizers))
    start = stream_of(num_quantizers).audio_start_id
    cases = [(0, 0), (num_quantizers, 0), (num_quantizers + 1, 0), (2 * num_quantizers, 3), (1, 7), (3, 1)]
    for row, (prompt, output) in enumerate(cases):
        text = [5, 6, 7] if row % 2 else []  # a prompt of text to speech
        constraint.add(row, [1, *text, start, *units(num_quantizers, prompt)], units(num_quantizers, output))
    assert allowed(constraint, len(cases)) == [expected(num_quantizers, sum(case)) for case in cases]


def test_output_that_grows_is_followed():
    constraint = FrameConstraint(Layout(BASE, 4))
    output: list[int] = []
    constraint.add(0, [1, stream_of(4).audio_start_id], output)
    for count in range(9):
        assert allowed(constraint, 1) == [expected(4, count)]
        output.append(-1)  # an id that vLLM has not yet brought to the host


def test_after_the_end_only_the_end_may_come():
    stream = stream_of(4)
    constraint = FrameConstraint(Layout(BASE, 4))
    for row, count in enumerate((0, 4)):
        output = [*units(4, count), *[stream.audio_end_id] * (row + 1)]
        constraint.add(row, [1, stream.audio_start_id], output)
    assert allowed(constraint, 2) == [{stream.audio_end_id}] * 2


@pytest.mark.parametrize("prompt", ["text", "asr", "none", "broken"])
def test_prompts_with_no_open_audio_are_left_alone(prompt):
    stream = stream_of(2)
    start, end = stream.audio_start_id, stream.audio_end_id
    ids = {"text": [1, 5, 6], "asr": [1, start, *units(2, 4), end], "none": None, "broken": [1, start, 5, *units(2, 2)]}
    constraint = FrameConstraint(Layout(BASE, 2))
    constraint.add(0, [1, start], [])
    constraint.add(1, ids[prompt], [])
    constraint.add(0, ids[prompt], [])  # in place of one that was held to frames
    assert allowed(constraint, 2) == [set(range(end + 5))] * 2


def test_rows_that_are_removed_added_and_moved_keep_their_turn():
    processor = FrameProcessor.__new__(FrameProcessor)
    processor.constraint = FrameConstraint(Layout(BASE, 4))
    start = stream_of(4).audio_start_id
    everything = set(range(start + 6))
    swap, one_way = SimpleNamespace(name="SWAP"), SimpleNamespace(name="UNIDIRECTIONAL")

    def prompt(count: int) -> tuple:
        return (None, [1, start, *units(4, count)], [])

    def update(removed=(), added=(), moved=()):
        processor.update_state(SimpleNamespace(removed=removed, added=added, moved=moved))

    update(added=[(row, *prompt(row)) for row in range(4)] + [(4, None, [1, 5], [])])
    processor.update_state(None)
    assert allowed(processor.constraint, 5) == [*[expected(4, row) for row in range(4)], everything]
    update(moved=[(0, 3, swap), (4, 1, swap)])
    assert allowed(processor.constraint, 5) == [
        expected(4, 3),
        everything,
        expected(4, 2),
        expected(4, 0),
        expected(4, 1),
    ]
    # One leaves, one takes its place, the last row fills the hole of another that left.
    update(removed=[0, 1], added=[(0, *prompt(6))], moved=[(4, 1, one_way)])
    assert allowed(processor.constraint, 4) == [expected(4, count) for count in (6, 1, 2, 0)]
    update(removed=[3], moved=[(1, 0, one_way)])
    assert allowed(processor.constraint, 3) == [expected(4, 1), everything, expected(4, 2)]
    update(removed=[0, 2])
    assert allowed(processor.constraint, 1) == [everything]


@pytest.mark.parametrize("num_quantizers", [1, 4, 8])
def test_layout_is_that_of_the_token_stream(make_tokenizer, num_quantizers):
    tokenizer = make_tokenizer()
    stream = extend_tokenizer(tokenizer, num_quantizers)
    layout = Layout.from_vocab(tokenizer.get_added_vocab(), "model")
    assert (layout.base_size, layout.num_quantizers) == (stream.base_size, num_quantizers)
    assert (layout.audio_start_id, layout.audio_end_id) == (stream.audio_start_id, stream.audio_end_id)


def test_a_tokenizer_that_does_not_fit_is_refused_at_start(make_tokenizer):
    tokenizer = make_tokenizer()
    extend_tokenizer(tokenizer, 2)
    vocab = tokenizer.get_added_vocab()
    with pytest.raises(ValueError, match="no audio tokens"):
        Layout.from_vocab({"<s>": 0}, "model")
    with pytest.raises(ValueError, match=r"model: the tokenizer has <1_0>"):
        Layout.from_vocab({**vocab, "<1_0>": vocab["<1_1>"], "<1_1>": vocab["<1_0>"]}, "model")


@pytest.mark.parametrize(
    ("config", "size", "reason"), [({"num_quantizers": 4}, 10_000, "says 4"), ({}, 4000, "4,000 ids")]
)
def test_a_checkpoint_that_does_not_fit_its_tokenizer_is_refused_at_start(
    make_tokenizer, tmp_path, config, size, reason
):
    tokenizer = make_tokenizer()
    extend_tokenizer(tokenizer, 2)
    tokenizer.save_pretrained(tmp_path)
    model = SimpleNamespace(
        model="model", tokenizer=str(tmp_path), tokenizer_revision=None, hf_config=SimpleNamespace(**config)
    )
    model.get_vocab_size = lambda: size
    with pytest.raises(ValueError, match=reason):
        FrameProcessor(SimpleNamespace(model_config=model), torch.device("cpu"), False)


@pytest.fixture(scope="module")
def served(tmp_path_factory, save_speech_model, mimi_folder, make_sound):
    """A checkpoint with 4 quantizers, and a prompt of 13 frames."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "prompt.flac").write_bytes(make_sound(1, 1.0))
    return save_speech_model(folder / "model", mimi_folder), folder / "prompt.flac"


@pytest.fixture
def server():
    """A server whose answer is set by the test: ``answer`` (status and lines), and the ``requests`` it got."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            played.requests.append((self.path, body))
            status, lines = played.answer
            self.send_response(status)
            self.end_headers()
            self.wfile.write("".join(f"{line}\n" for line in lines).encode())

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    played = SimpleNamespace(address=f"http://127.0.0.1:{http.server_port}", answer=(200, []), requests=[])
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield played
    http.shutdown()
    thread.join()
    http.server_close()


def events(*chunks: list[int]) -> list[str]:
    """The lines of a stream of ids that ends well."""
    lines = [f"data: {json.dumps({'choices': [{'text': '', 'token_ids': chunk}]})}" for chunk in chunks]
    return [part for line in [*lines, "data: [DONE]"] for part in (line, "")]


def test_client_sends_the_prompts_ids_and_writes_prompt_and_continuation(served, server, tmp_path, capsys):
    model, prompt = served
    stream, codec = serve_client.load_ends(str(model), None)
    codes = torch.arange(12).reshape(4, 3)
    ids = [*stream.encode(codes).tolist(), stream.audio_end_id]
    server.answer = 200, events(ids[:1], ids[1:7], [], ids[7:])
    output = tmp_path / "out.wav"
    options = serve_client.Options(str(model), prompt, output, server.address, max_seconds=2.0, top_k=None)
    serve_client.run(options)

    ((path, request),) = server.requests
    before = codec.encode([load_audio(prompt)])[0]
    assert path == "/v1/completions"
    assert request["prompt"] == stream.sample(before, end=False).tolist()
    assert request["stop_token_ids"] == [stream.audio_end_id]
    assert request["max_tokens"] == 4 * (25 - 13)  # 2 s are 25 frames
    assert request["return_token_ids"] and request["stream"] and request["top_k"] == -1
    audio, rate = soundfile.read(output, dtype="float32")
    assert rate == 24_000
    wanted = codec.decode(torch.cat([before, codes], dim=1)).clamp(-1, 1)
    assert torch.allclose(torch.from_numpy(audio), wanted, atol=1e-4)
    assert "13 frames; continuation: 3 frames, 0.24 s, ended by itself" in capsys.readouterr().out


def test_frames_end_at_the_end_mark_or_where_a_frame_is_cut():
    stream = stream_of(4)
    ids = stream.encode(torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])).tolist()
    for tail in ([], [stream.audio_end_id], ids[:3], [stream.audio_end_id] * 5):
        frames = list(serve_client.whole_frames(stream, [*ids, *tail]))
        assert [frame[:, 0].tolist() for frame in frames] == [[1, 3, 5, 7], [2, 4, 6, 8]]
    with pytest.raises(UserError, match=r"no frame of 4 units in order.*vllm_frames:FrameProcessor"):
        list(serve_client.whole_frames(stream, ids[1:5]))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (400, ['{"error": {"message": "This model\'s maximum\\n context length is 64"}}']),
            "400: This model's maximum con",
        ),
        ((500, ["oops"]), "500: Internal Server Error"),
        ((200, ['data: {"error": {"message": "out of memory"}}']), "gave up .out of memory"),
        ((200, events([BASE])[:1]), "broke off"),
        ((200, ["<html>"]), "no stream of ids"),
        ((200, ['data: {"choices": [{"text": "a"}]}']), "no stream of ids came from there .'token_ids'"),
    ],
)
def test_a_server_that_does_not_answer_with_ids_is_one_clear_sentence(server, answer, message):
    server.answer = answer
    with pytest.raises(UserError, match=message):
        list(serve_client.send(server.address, {}))


def test_no_server_is_one_clear_sentence():
    with pytest.raises(UserError, match=r"127.0.0.1:9/v1/completions: no stream of ids came from there"):
        list(serve_client.send("http://127.0.0.1:9", {}))


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_sent(served, server, tmp_path):
    model, prompt = served
    options = serve_client.Options(str(model), prompt, tmp_path / "out.wav", server.address, max_seconds=0.5)
    with pytest.raises(UserError, match="fills max_seconds"):
        serve_client.run(options)
    assert server.requests == []
