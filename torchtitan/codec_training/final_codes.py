"""Between stages 2 and 3: encoder and codebooks become final."""

import numpy as np
import torch
from tqdm import tqdm

from torchtitan.audio.codec import no_tf32
from torchtitan.audio.token_stream import CODEBOOK_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.codec_training.autoencoder import Autoencoder
from torchtitan.codec_training.codebooks import fit_codebooks, fit_common_and_rare, without_speaker
from torchtitan.codec_training.options import Options
from torchtitan.codec_training.precision import round_to_half
from torchtitan.codec_training.speech import Speech

FITTED_FRAMES, COMMON_FRAMES = 100_000, 30_000
"""Frames of each data set that the last fit looks at; fewer where some entries are at rare latents, since finding those
takes a pass over the frames for each entry."""
LONGEST_SECONDS = 30
FINAL_ROUNDS = 30
"""Rounds of k-means in the last fit."""


@torch.no_grad()
def finish_encoder(autoencoder: Autoencoder, speech: Speech, options: Options, directions: int, step: int) -> None:
    """Make the encoder final and fit the codebooks to it for the last time, on whole clips, in float32.

    Args:
        directions: of the speaker, that are taken out of the semantic latents.
        step: the seed of the fit.
    """
    round_to_half(autoencoder.encoder_parameters())
    autoencoder.eval()
    last = range(speech.firsts[-1], len(speech))
    common = options.common_entries
    whole = min(common) == CODEBOOK_SIZE
    most = FITTED_FRAMES if whole else COMMON_FRAMES
    own, other = (latents_of(autoencoder, speech, clips, most, options.seed) for clips in (last, range(last.start)))
    if 0 < directions < len(own) + len(other):
        kept = without_speaker([clip[0] for clip in own + other], directions)
        projection = autoencoder.halves[0].input_proj.weight
        projection.copy_((kept @ projection[:, :, 0]).half().float()[:, :, None])
        own, other = ([torch.stack([clip[0] @ kept.T, clip[1]]) for clip in clips] for clips in (own, other))
    if whole:
        anew = options.start_from is not None
        fit_codebooks(autoencoder.halves, torch.cat([*own, *other], 1), step, FINAL_ROUNDS, anew)
    else:
        # Of no clips: [2, 0, codebook_dim].
        none = own[0][:, :0]
        spare = torch.cat([none, *other], 1)
        fit_common_and_rare(autoencoder.halves, torch.cat(own, 1), spare, common, options.rare_entries, step)
    autoencoder.train()


def latents_of(autoencoder: Autoencoder, speech: Speech, clips: range, most: int, seed: int) -> list[torch.Tensor]:
    """Latents [2, frames, codebook_dim] of whole clips (of 30 s at most), in random order, up to `most` frames."""
    device = autoencoder.head.weight.device
    order = np.random.default_rng(seed).permutation(clips)
    found: list[torch.Tensor] = []
    frames = 0
    for number in tqdm(order, "latents", mininterval=5):
        clip = speech.clip(int(number), 0, LONGEST_SECONDS * SAMPLE_RATE).to(device)
        with no_tf32(device):
            semantic, acoustic = autoencoder.encode(clip[None])
        found.append(torch.stack([semantic[0].T, acoustic[0].T]))
        frames += found[-1].shape[1]
        if frames >= most:
            break
    return found
