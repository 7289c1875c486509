"""Owns what a model will hold on a device: the bytes of its weights as they are packed there, counted of a blank model. Decode thread."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType

import torch
from torch import Tensor

from worker.models.blank import Stored
from worker.models.contract import Model
from worker.models.head import KEPT_BYTES, Head
from worker.models.linear import PackedLinear, by_kernels
from worker.models.words import TiedWords
from worker.native.products import BF16, SAME, Products, format_of, products
from worker.native.quantised import Quantised

_SCALE_BYTES = 2  # of a GPU's repacked weights: fp16


@dataclass(frozen=True, slots=True)
class Planned:
    """`widest`: outputs of the widest product besides the head."""

    weight_bytes: int
    widest: int


def planned(model: Model, stored: Stored, device: torch.device, dtype: torch.dtype) -> Planned:
    """Of a blank model (`blank.blank_model`) that computes in `dtype` on `device`."""
    native = products(device)
    tensors: dict[int, int] = {}  # by storage: several may share one
    total, widest = 0.0, 0
    heads = {id(part) for one in _parts(model) if isinstance(one, Head) for part in _parts(one)}
    for one in _parts(model):
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            tensors[storage._cdata] = storage.nbytes()
        elif isinstance(one, TiedWords):
            table = one.table
            if table is not None and not _reads_back(one, device, dtype, native):
                tensors[table.untyped_storage()._cdata] = table.untyped_storage().nbytes()
        elif isinstance(one, PackedLinear):
            is_head = id(one) in heads
            total += _product_bytes(one, is_head, stored, device, dtype, native, tensors)
            widest = widest if is_head else max(widest, one.out_features)
    return Planned(int(total) + sum(tensors.values()), widest)


def _product_bytes(
    linear: PackedLinear,
    is_head: bool,
    stored: Stored,
    device: torch.device,
    dtype: torch.dtype,
    native: Products | None,
    tensors: dict[int, int],
) -> float:
    weight = linear.weight
    outputs, inputs = weight.shape
    count = outputs * inputs
    if not isinstance(weight, Tensor):
        if by_kernels(device):
            return _repacked_bytes(weight)
        if native is not None and native.multiplies_blocks(dtype):
            return native.num_bytes(outputs, inputs, format_of(weight))
        return count * dtype.itemsize
    if device.type != "cpu":  # the tensor itself, which may be the table of words too
        storage = weight.untyped_storage()
        tensors[storage._cdata] = storage.nbytes()
        return 0
    if native is not None and native.can_multiply(dtype, inputs, outputs):
        whole = native.num_bytes(outputs, inputs, SAME, dtype)
        if dtype != torch.float32 or inputs % 2:
            return whole
        share = 1.0 if weight.dtype == torch.bfloat16 else stored.share_bf16
        return share * native.num_bytes(outputs, inputs, BF16) + (1 - share) * whole
    is_wide = is_head and count * 4 <= KEPT_BYTES
    return count * (4 if is_wide else dtype.itemsize)


def _reads_back(words: TiedWords, device: torch.device, dtype: torch.dtype, native: Products | None) -> bool:
    """Whether a head packed on `device` gives rows back, so that no table is held beside it; see `Head.words`."""
    if device.type != "cpu" or native is None:
        return False
    if not isinstance(words.packed.weight, Tensor):
        return native.multiplies_blocks(dtype)
    return native.can_multiply(dtype, words.packed.in_features, words.packed.out_features)


def _repacked_bytes(weight: Quantised) -> float:
    levels = weight.levels()
    bits = 4 if weight.kind.startswith("Q4") else 8
    scales = levels.scale.numel() + (0 if levels.least is None else levels.least.numel())
    return levels.q.numel() * bits / 8 + scales * _SCALE_BYTES


def _parts(holder: object) -> Iterator[object]:
    """Products, heads and tensors that a model holds on to; what lies within a product is the product's."""
    seen: set[int] = set()
    left = [holder]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor | PackedLinear):
            yield one
        elif isinstance(one, TiedWords):  # its table is held on some devices only
            yield one
            left.append(one.packed)
        elif isinstance(one, MethodType):
            left.append(one.__self__)
        elif isinstance(one, FunctionType):
            left += [cell.cell_contents for cell in one.__closure__ or ()]
        elif type(one).__module__.startswith("worker.") or isinstance(one, list | tuple | dict):
            if isinstance(one, Head):
                yield one
            left += gc.get_referents(one)
