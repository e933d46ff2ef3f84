"""The README's public commands, one after the other in one process, from hub names and from local folders.

usage: hub_commands.py MODEL CODEC BASE DATA; the hub is that of HF_ENDPOINT, the working directory a new one.
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
model, codec, base, data = sys.argv[1:]


def run(script: str, *arguments: str) -> None:
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as ended:
        if ended.code not in (0, None):
            sys.exit(f"{script} {arguments}: exit code {ended.code}")


local = ("--model_name", model, "--audio_tokenizer", codec)
# The prompt, a few frames more, and nothing but what the hub has.
run("inference.py", "--max_seconds", "4")
Path("output.wav").rename("hub.wav")
run("inference.py", "--max_seconds", "4", *local)
Path("output.wav").rename("local.wav")

for name, folder in (("salmon", "slprl/SALMon"), ("sLM21", "speed"), ("sStoryCloze", "speed")):
    run(f"eval/{name}.py", "--model_name", "llm-jp/Llama-Mimi-1.3B", "--cache_dir", "none")
    run(f"eval/{name}.py", *local, "--dataset", f"{data}/{folder}", "--output_dir", "local", "--cache_dir", "none")

from torchtitan import train  # noqa: E402

recipe = [
    *("--training.task", "a2a", "--training.seq_len", "64", "--training.local_batch_size", "2"),
    *("--training.global_batch_size", "4", "--training.steps", "3", "--training.mixed_precision_param", "float32"),
    *("--validation.enabled", "--validation.dataset", "librispeech_asr_test", "--validation.seq_len", "64"),
    *("--validation.freq", "2", "--validation.steps", "2", "--validation.local_batch_size", "2"),
    *("--metrics.log_freq", "1", "--training.dataset", "peoples_speech"),
]
public = ["--model.name", "meta-llama/Llama-3.2-1B", "--model.audio_tokenizer", "kyutai/mimi"]
assert train.main([*recipe, *public, "--job.dump_folder", "from_hub"]) == 0

from huggingface_hub.cli.hf import main as hf  # noqa: E402

sys.argv = "hf download MLCommons/peoples_speech --repo-type dataset --local-dir data/peoples_speech".split()
for _ in range(5):  # hf itself gives up at once
    try:
        hf()
    except SystemExit as ended:
        if ended.code in (0, None):
            break
    except Exception as error:
        print(f"hf download: {error}", file=sys.stderr)
assert train.main([*recipe, *public, "--job.dump_folder", "from_folder"]) == 0
paths = [
    *("--training.dataset_path", f"{data}/MLCommons/peoples_speech"),
    *("--validation.dataset_path", f"{data}/openslr/librispeech_asr"),
    *("--model.name", base, "--model.audio_tokenizer", codec),
]
assert train.main([*recipe, *paths, "--job.dump_folder", "from_paths"]) == 0
