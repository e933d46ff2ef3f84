"""Judge a small Mimi codec on speech: what is left of words and voices in its codes, and how the codes are used.

    python scripts/measure_codec.py --codec assets/mimi-small --output outputs/measures
    python scripts/measure_codec.py --model outputs/quickstart/hf/quickstart --real MY_SPEECH MORE_SPEECH

All measures but the use of the codebooks are taken on clips that neither codec nor classifiers have seen, and have a
standard error:

1. Round trips, at 8 and at 4 quantizers: short-time objective intelligibility (STOI) against the input, and the
   distance of log-mel spectra; also on speech of other people (`--real`).
2. The use of each codebook: entries used, entropy, perplexity.
3. What each codebook holds: how well a clip's histogram of codes tells the voice, and how many nats a code tells about
   the voice and about the sound. A good semantic codebook tells much about the sound and little about the voice.
4. Words: a classifier that learned clean spoken words hears their round trips.
5. Voices: a classifier that learned clean voices hears round trips and, with `--model`, continuations of prompts.

<output>/measures.json holds all figures; the tables are printed. The same command on the same machine gives the same
figures, apart from `timing`. espeak-ng speaks the words; without it, measure 4 is left out. `--speech` has the voices
and the layout of scripts/build_assets.py.
"""

import tyro

from torchtitan.codec_training.judging.measure import Options, report
from torchtitan.tools.errors import run_command


def command() -> None:
    report(tyro.cli(Options, description=__doc__, use_underscores=True))


if __name__ == "__main__":
    run_command(command)
