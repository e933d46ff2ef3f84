"""Train a small Mimi codec from scratch, on any speech, on a CPU or a GPU.

    python scripts/train_codec.py --data MY_SPEECH --output codecs/mine

The result is a folder that ``MimiModel.from_pretrained`` loads: 24 kHz, 12.5 frames a second, 8 codebooks of 2,048
entries, the first of them semantic. `--data` takes data sets as training reads them: folders of parquet, audio files,
manifests or tars, local or on the hub. A run that was stopped continues when the same command is given again. Figures
of the result: scripts/measure_codec.py.

How it is trained (docs/codec.md says why, and what else was tried):

1. Continuous. Encoder and decoder learn as an autoencoder whose latents carry noise instead of being quantized. The
   loss is the distance of log-mel spectra at five resolutions. The semantic latents, which the first codebook will
   quantize, also predict clusters of speaker-normalised MFCCs, four for each frame: what is spoken, not who speaks.
2. Quantized. Residual k-means of the latents of the last steps gives the codebooks; gradients pass straight through
   them. They are refitted from time to time, starting from the previous ones; unused entries start anew.
3. Decoder. Encoder and codebooks are final, rounded to float16, in which they are stored. The decoder learns on, and
   from `adversarial_from` on discriminators of spectra at three resolutions judge it.

`--start_from` fits the codebooks of a trained codec to other speech, keeps its encoder and repeats stage 3.
"""

import tyro

from torchtitan.codec_training.options import Options
from torchtitan.codec_training.training import train
from torchtitan.tools.errors import run_command

if __name__ == "__main__":
    run_command(lambda: train(tyro.cli(Options, description=__doc__, use_underscores=True)))
