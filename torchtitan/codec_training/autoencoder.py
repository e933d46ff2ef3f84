"""A small Mimi in training: config, halves, first weights, precision, and the folder that it is stored in."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save

from torchtitan.audio.codec import FRAME_SIZE, Codec, published_names
from torchtitan.audio.token_stream import CODEBOOK_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.codec_training.codebooks import nearest
from torchtitan.codec_training.data import TEACHER_COLUMNS
from torchtitan.codec_training.options import QUANTIZERS, Options
from torchtitan.datasets.shards import write_atomically
from torchtitan.tools.errors import UserError

CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.ConvTranspose1d)


def make_config(options: Options) -> Any:
    """The MimiConfig of the options. Attention spans the rows of a batch, so it never sees further than in training."""
    from transformers import MimiConfig

    if math.prod(options.upsampling_ratios) * 2 != FRAME_SIZE:
        raise UserError(f"upsampling_ratios {options.upsampling_ratios}: their product must be {FRAME_SIZE // 2}.")
    if options.hidden_size % 8:
        raise UserError(f"hidden_size {options.hidden_size}: it must be a multiple of 8, for 4 attention heads.")
    if options.hidden_size == options.codebook_dim:
        raise UserError(
            f"codebook_dim {options.codebook_dim}: it must not be the hidden_size, which has no projection."
        )
    return MimiConfig(
        hidden_size=options.hidden_size,
        num_filters=options.num_filters,
        codebook_dim=options.codebook_dim,
        vector_quantization_hidden_dimension=options.codebook_dim,
        codebook_size=CODEBOOK_SIZE,
        num_quantizers=QUANTIZERS,
        num_semantic_quantizers=1,
        upsample_groups=options.hidden_size,
        upsampling_ratios=list(options.upsampling_ratios),
        num_hidden_layers=1,
        intermediate_size=3 * options.hidden_size // 2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=options.hidden_size // 4,
        layer_scale_initial_scale=0.3,
        sliding_window=2 * options.frames,
    )


def new_model(options: Options) -> Any:
    """A MimiModel with random weights, or the one to start from.

    Raises:
        UserError: an option does not fit, or the codec to start from cannot be used.
    """
    from transformers import MimiModel

    if options.start_from is None:
        return MimiModel(make_config(options))
    model = Codec.load(options.start_from, QUANTIZERS).model.requires_grad_(True)
    if model.config.num_quantizers != QUANTIZERS or model.config.codebook_size != CODEBOOK_SIZE:
        raise UserError(f"{options.start_from}: it must have 8 codebooks of {CODEBOOK_SIZE} entries.")
    return model


def parameters_of(*modules: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


class Autoencoder(torch.nn.Module):
    """A MimiModel as it is trained, with the head that predicts the semantic teacher's clusters."""

    def __init__(self, model: Any, clusters: int):
        super().__init__()
        self.model = model
        self.head = torch.nn.Linear(model.config.codebook_dim, TEACHER_COLUMNS * clusters)
        # transformers 5.23 nests the parts, earlier versions keep them at the top.
        nested = hasattr(model.encoder, "encoder_seanet")
        encoder, decoder = (model.encoder, model.decoder) if nested else (model, model)
        encoder_seanet = encoder.encoder_seanet if nested else model.encoder
        decoder_seanet = decoder.decoder_seanet if nested else model.decoder
        self._encoder = (encoder_seanet, encoder.encoder_transformer, encoder.downsample)
        self._decoder = (decoder.upsample, decoder.decoder_transformer, decoder_seanet)
        quantizer = model.quantizer
        self.halves = (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer)

    def encoder_parameters(self) -> list[torch.nn.Parameter]:
        """Everything that codes depend on: encoder, projections into the codebooks' spaces, the head."""
        return parameters_of(*self._encoder, *(half.input_proj for half in self.halves), self.head)

    def decoder_parameters(self) -> list[torch.nn.Parameter]:
        """The rest: what turns codes into sound."""
        return parameters_of(*self._decoder, *(half.output_proj for half in self.halves))

    def encode(self, waveform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, samples] to the semantic and the acoustic latents, each [B, codebook_dim, frames]."""
        seanet, transformer, downsample = self._encoder
        hidden = transformer(seanet(waveform[:, None]).transpose(1, 2))[0]
        latents = downsample(hidden.transpose(1, 2))
        semantic, acoustic = (half.input_proj(latents) for half in self.halves)
        return semantic, acoustic

    def decode(self, semantic: torch.Tensor, acoustic: torch.Tensor) -> torch.Tensor:
        """The latents, quantized or not, to [B, samples]."""
        upsample, transformer, seanet = self._decoder
        latents = sum(half.output_proj(part) for half, part in zip(self.halves, (semantic, acoustic), strict=True))
        hidden = transformer(upsample(latents).transpose(1, 2))[0]
        return seanet(hidden.transpose(1, 2))[:, 0].float()

    def semantic_loss(self, semantic: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the teacher's clusters [B, 4 * frames], given [B, codebook_dim, frames]."""
        logits = self.head(semantic.transpose(1, 2)).float()
        return F.cross_entropy(logits.reshape(labels.numel(), -1), labels.flatten(), ignore_index=-1)

    def quantize(
        self, semantic: torch.Tensor, acoustic: torch.Tensor, quantizers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest entries, of the first `quantizers[b]` codebooks in row b. Without gradients."""
        quantized = []
        used = 0
        for half, part in zip(self.halves, (semantic, acoustic), strict=True):
            residual = part.detach().float().transpose(1, 2)
            total = torch.zeros_like(residual)
            for layer in half.layers:
                entries = layer.codebook.embed
                entry = F.embedding(nearest(residual.flatten(0, 1), entries), entries).view_as(residual)
                entry = entry * (used < quantizers)[:, None, None]
                total, residual, used = total + entry, residual - entry, used + 1
            quantized.append(total.transpose(1, 2))
        return quantized[0], quantized[1]


@torch.no_grad()
def scale_weights(autoencoder: Autoencoder, waveform: torch.Tensor) -> None:
    """Scale each convolution to outputs of variance 1, and begin with quiet sound.

    This is layer-sequential unit-variance initialisation (arXiv 1511.06422). With the weights that transformers draws,
    features grow from layer to layer, and the first steps explode.
    """

    def unit(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        deviation = output.float().std()
        module.weight.div_(deviation)
        if module.bias is not None:
            module.bias.zero_()
        return output / deviation

    convolutions = [m for m in autoencoder.model.modules() if isinstance(m, CONVOLUTIONS) and m.groups == 1]
    hooks = [module.register_forward_hook(unit) for module in convolutions]
    autoencoder.decode(*autoencoder.encode(waveform))
    for hook in hooks:
        hook.remove()
    last = [module for module in autoencoder._decoder[2].modules() if isinstance(module, torch.nn.Conv1d)][-1]
    last.weight.mul_(0.02)


def keep_in_float32(model: torch.nn.Module) -> list[str]:
    """Find the convolutions that this CPU gets wrong in bfloat16, and run them in float32; returns their names.

    With fewer than 32 channels and a large stride, oneDNN gets some wrong (torch 2.14 on a CPU with AMX: the output of
    Conv1d(24, 48, 16, 8), the input's gradient of ConvTranspose1d(48, 24, 16, 8)). The losses would look well, but the
    codec, which runs in float32, would be another function. So each convolution is tried in both precisions.
    """
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for name, module in model.named_modules():
        if not isinstance(module, CONVOLUTIONS):
            continue
        length = 8 * module.kernel_size[0] if isinstance(module, torch.nn.Conv1d) else 64
        hidden = torch.randn(4, module.in_channels, length, generator=generator)
        results: list[list[torch.Tensor]] = []
        weights = torch.randn(module(hidden).shape, generator=generator)
        for enabled in (False, True):
            given = hidden.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                made = module(given).float()
            results.append([made, *torch.autograd.grad((made * weights).sum(), [given, module.weight])])
        similarities = [F.cosine_similarity(a.flatten(), b.flatten(), 0) for a, b in zip(*results, strict=True)]
        if min(similarities) < 0.99:
            wrong.append(name)
            forward = module.forward

            def exact(hidden: torch.Tensor, forward: Any = forward) -> torch.Tensor:
                with torch.autocast(hidden.device.type, enabled=False):
                    return forward(hidden.float())

            vars(module)["forward"] = exact
    return wrong


@torch.no_grad()
def round_to_half(parameters: list[torch.nn.Parameter]) -> None:
    """Round weights to float16, in which the codec is stored."""
    for parameter in parameters:
        parameter.copy_(parameter.half().float())


def save_codec(model: Any, folder: Path) -> None:
    """Write a folder that MimiModel.from_pretrained of any version loads; weights are float16, to run in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().half().contiguous() for name, value in model.state_dict().items()}
    content = save(published_names(weights), metadata={"format": "pt"})
    write_atomically(folder / "model.safetensors", lambda file: file.write(content))
    config = {**model.config.to_diff_dict(), "architectures": ["MimiModel"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    extractor = {
        **{"chunk_length_s": None, "feature_extractor_type": "EncodecFeatureExtractor", "feature_size": 1},
        **{"overlap": None, "padding_side": "right", "padding_value": 0.0, "return_attention_mask": True},
        "sampling_rate": SAMPLE_RATE,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor, indent=2) + "\n")
