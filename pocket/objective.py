"""Owns what training minimises: the losses of one batch, and the throw-away heads; runs in the training process."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocket.network import MASKED, Network
from pocket.scenes import COLOR_NAMES, SHAPES

BINS = 1024


@dataclass(frozen=True)
class Weights:
    """How much each part counts, and how far bins are blurred; change over a run."""

    language: float = 1.0  # 0 trains the encoder alone, on what covers each patch
    region: float = 0.6
    auxiliary: float = 0.8
    blur_bins: float = 8.0
    value_noise: float = 0.004


class AuxiliaryHeads(nn.Module):
    """Linear read-outs of what covers each patch and whose centre lies in each cell; thrown away after training."""

    def __init__(self, enc_dim: int, proj_dim: int) -> None:
        super().__init__()
        outputs = len(COLOR_NAMES) + 1 + len(SHAPES) + 1 + 6
        self.patch = nn.Linear(enc_dim, outputs)
        self.cell = nn.Linear(proj_dim, outputs)


def attention_mask(segments: Tensor, sees: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores to add, (B, 1, T, T): a segment sees what stands before it in its sequence, and its own past.

    segments int (B, T), 0 for padding; sees bool (B, S, S): [b, i, j], segment i sees all of segment j.
    """
    batch, length = segments.shape
    rows = torch.arange(batch, device=segments.device)[:, None, None]
    allowed = sees[rows, segments[:, :, None], segments[:, None, :]]
    same = segments[:, :, None] == segments[:, None, :]
    allowed = allowed | same.tril()
    mask = torch.zeros(batch, length, length, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~allowed, MASKED)[:, None]


def blurred_loss(logits: Tensor, bins: Tensor, blur_bins: float) -> Tensor:
    """Mean divergence from a bell around each bin: logits (N, 1024), bins int (N,). Zero when met exactly."""
    offsets = torch.arange(BINS, device=bins.device)[None, :] - bins[:, None]
    target = torch.softmax(-0.5 * (offsets / blur_bins).square(), dim=-1)
    return F.kl_div(torch.log_softmax(logits.float(), dim=-1), target, reduction="batchmean")


def auxiliary_loss(outputs: Tensor, classes: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of a read-out and its share of right shapes: outputs (M, F), classes int (M, 2), shapes (M, 6)."""
    first, second = len(COLOR_NAMES) + 1, len(COLOR_NAMES) + len(SHAPES) + 2
    outputs = outputs.float()
    color, shape, geometry = outputs[:, :first], outputs[:, first:second], outputs[:, second:]
    filled = classes[:, 0] > 0
    weight = torch.where(filled, 1.0, 0.25)
    loss = (F.cross_entropy(color, classes[:, 0], reduction="none") * weight).sum() / weight.sum()
    # Colours are learned at once; shapes are what takes long.
    loss = loss + 2 * (F.cross_entropy(shape, classes[:, 1], reduction="none") * weight).sum() / weight.sum()
    # Told whether something is there, which shape is it?
    right = shape[:, 1:].argmax(-1) + 1 == classes[:, 1]
    # As many cells are empty as things are missing: count only what is there.
    num = filled.sum().clamp(min=1)
    distance = F.smooth_l1_loss(geometry, shapes, beta=0.05, reduction="none").sum(-1) / 4
    return loss + (distance * filled).sum() / num, (right & filled).sum() / num


def compute_losses(
    network: Network,
    heads: AuxiliaryHeads,
    batch: dict[str, Tensor],
    weights: Weights,
    noise: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss and figures to watch, for a batch as `draw_batch` makes it."""
    device = network.text.wte.device
    tilings = [(int(h), int(w)) for h, w in batch["tilings"].tolist()]
    features = network.vision.encode(batch["crops"])
    image = network.vision.embed(features, tilings)

    zero = torch.zeros((), device=device)
    language, right, coord_loss, size_loss, miss = (zero,) * 5
    if weights.language:
        language, right, coord_loss, size_loss, miss = _answer_losses(network, batch, image, weights, noise)

    patch_loss, patch_right = auxiliary_loss(
        heads.patch(features.view(-1, features.shape[-1])),
        batch["patch_classes"].view(-1, 2),
        batch["patch_shapes"].view(-1, 6),
    )
    cell_loss, cell_right = auxiliary_loss(
        heads.cell(image.reshape(-1, image.shape[-1])),
        batch["cell_classes"].view(-1, 2),
        batch["cell_shapes"].view(-1, 6),
    )
    total = (
        language + weights.region * (coord_loss + size_loss) + weights.auxiliary * (patch_loss + cell_loss)
    )
    figures = {
        "loss": total, "language": language, "right": right, "coord": coord_loss, "size": size_loss, "miss": miss,
        "patch": patch_loss, "patch_right": patch_right, "cell": cell_loss, "cell_right": cell_right,
    }  # fmt: skip
    return total, {name: value.detach() for name, value in figures.items()}


def _answer_losses(
    network: Network, batch: dict[str, Tensor], image: Tensor, weights: Weights, noise: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Language loss, share of tokens right, coordinate loss, size loss and mean miss of the coordinates."""
    dtype = network.text.wte.dtype
    device = network.text.wte.device
    ids, kinds, values = batch["ids"], batch["kinds"], batch["values"]
    num_rows, length = ids.shape
    embedded = F.embedding(ids, network.text.wte).view(num_rows * length, -1)
    kinds = kinds.view(-1)
    values = values.view(-1, 2)
    jitter = torch.randn(values.shape, generator=noise).to(device) * weights.value_noise
    is_coord, is_size = (kinds == 1).nonzero()[:, 0], (kinds == 2).nonzero()[:, 0]
    coords = (values + jitter)[is_coord, :1].clamp(0, 1)
    sizes = (values * (1 + 4 * jitter))[is_size].clamp(2.0**-10, 1)
    embedded = embedded.index_put((is_coord,), network.region.encode_coordinate(coords))
    embedded = embedded.index_put((is_size,), network.region.encode_size(sizes))

    # Pictures lie in the order of the rows, and in a row in the order of their positions.
    in_picture = (kinds == 3).nonzero()[:, 0]
    embedded = embedded.index_put((in_picture,), image.reshape(-1, image.shape[-1]))

    mask = attention_mask(batch["segments"], batch["sees"], dtype)
    hidden = network.text.decode(embedded.view(num_rows, length, -1), batch["positions"], mask)
    hidden = hidden.reshape(num_rows * length, -1)

    tokens = batch["tokens"].view(-1)
    asked = (tokens >= 0).nonzero()[:, 0]
    logits = network.text.logits(hidden[asked]).float()
    share = batch["weights"].view(-1)[asked]
    each = F.cross_entropy(logits, tokens[asked], reduction="none")
    language = (each * share).sum() / share.sum()
    right = (logits.argmax(-1) == tokens[asked]).float().mean()

    coord_bins, size_bins = batch["coords"].view(-1), batch["sizes"].view(-1, 2)
    at_coord, at_size = (coord_bins >= 0).nonzero()[:, 0], (size_bins[:, 0] >= 0).nonzero()[:, 0]
    coord_loss = size_loss = miss = torch.zeros((), device=device)
    if len(at_coord):
        coord_logits = network.region.decode_coordinate(hidden[at_coord])
        coord_loss = blurred_loss(coord_logits, coord_bins[at_coord], weights.blur_bins)
        miss = (coord_logits.argmax(-1) - coord_bins[at_coord]).abs().float().mean() / BINS
    if len(at_size):
        size_logits = network.region.decode_size(hidden[at_size]).view(-1, BINS)
        size_loss = blurred_loss(size_logits, size_bins[at_size].view(-1), weights.blur_bins * 2)
    return language, right, coord_loss, size_loss, miss
