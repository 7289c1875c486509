"""Owns counting the memory that tensors take, whatever they are packed into. Whichever thread calls."""

from __future__ import annotations

import gc
from types import FunctionType, MethodType

import torch
from torch import Tensor


def held_bytes(*holders: object) -> int:
    """Bytes of all tensors that a model, or parts of one, hold on to; memory that several share counts once."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    left = list(holders)
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            if one.layout == torch.strided:
                storage = one.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            else:  # oneDNN's own, which shows no storage
                storages[id(one)] = one.numel() * one.element_size()
        elif isinstance(one, MethodType):
            left.append(one.__self__)
        elif isinstance(one, FunctionType):  # what it closes over, not the module that it lies in
            left += [cell.cell_contents for cell in one.__closure__ or ()]
        elif type(one).__module__.startswith("worker.") or isinstance(one, list | tuple | dict):
            left += gc.get_referents(one)
    return sum(storages.values())
