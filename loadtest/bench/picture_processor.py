"""Prepares pictures with transformers' fast processors, one a line of stdin. Its own process, in an environment of its own.

`python picture_processor.py` imports nothing of Degas. A request is a line of JSON, `{"model", "path"}`; its answer
`{"seconds", "shape"}`: processor time from the file's bytes to the pixels that a model is given, on one thread.
"""

from __future__ import annotations

import io
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# torchvision's compiled part is built for another torch than the CPU's. The processors resize by torch alone, so the
# registrations of operators that only it has are left out.
sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")


def _smolvlm() -> Any:
    from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor

    return SmolVLMImageProcessor(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})


def _qwen() -> Any:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})


PROCESSORS: dict[str, Callable[[], Any]] = {"smolvlm": _smolvlm, "qwen2.5-vl": _qwen}


def main() -> None:
    """Answer until stdin ends."""
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    made: dict[str, Any] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        data = Path(asked["path"]).read_bytes()
        processor = made.setdefault(asked["model"], None) or PROCESSORS[asked["model"]]()
        made[asked["model"]] = processor
        begin = time.process_time()
        image = Image.open(io.BytesIO(data)).convert("RGB")
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        seconds = time.process_time() - begin
        print(json.dumps({"seconds": seconds, "shape": list(pixels.shape)}), flush=True)


if __name__ == "__main__":
    main()
