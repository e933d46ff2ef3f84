"""Build the assets that ship with the repository, except the codec: synthetic speech, and a small base model.

With these and the codec of scripts/train_codec.py, training, inference and the evaluations run in minutes on a CPU,
without a network. Three parts:

- `speech` speaks made-up texts with espeak-ng in six voices and packs them in the layouts of the public data sets
  (MLCommons/peoples_speech, openslr/librispeech_asr, slprl/SALMon, speed/sWUGGY and its siblings), as Opus at 16 kHz.
  3 minutes.
- `tokenizer` trains a byte-level BPE on the training texts and writes the config of a small Llama beside it. 1 s.
- `corpus` speaks more texts in more voices, for training the codec; it does not ship. Half a minute.

`all` does the first two. espeak-ng (Debian package espeak-ng) is needed only here, not for training, inference or
evaluation. The same seed, machine and library versions give the same texts, waveforms and tokenizer.
"""

import argparse
import sys
from pathlib import Path

import torch

from scripts.assets.base_model import build_tokenizer
from scripts.assets.data_sets import build_corpus, build_speech


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["all", "speech", "tokenizer", "corpus"])
    parser.add_argument("--output", type=Path, help="folder to write to: assets, for the corpus outputs/codec_corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="minutes of training speech")
    parser.add_argument("--corpus-minutes", type=float, default=100.0, help="minutes of the codec's corpus")
    args = parser.parse_args(argv)
    output = args.output or Path("outputs/codec_corpus" if args.part == "corpus" else "assets")
    torch.set_num_threads(1)
    try:
        if args.part in ("all", "speech"):
            build_speech(output, args.minutes, args.seed)
        if args.part in ("all", "tokenizer"):
            build_tokenizer(output)
        if args.part == "corpus":
            build_corpus(output, args.corpus_minutes, args.seed + 1)
    except RuntimeError as error:
        sys.exit(f"build_assets: {error}")


if __name__ == "__main__":
    main()
