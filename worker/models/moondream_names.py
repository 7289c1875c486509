"""Owns the names of a Moondream checkpoint's tensors: two layouts, each of two generations, to one. Decode thread.

Moondream 2's releases have the newer layout and an older one; Moondream 3's preview has the newer, 3.1 the older, with its
experts in FP8 and a scale a row.
"""

from __future__ import annotations

import re

from worker.formats.safetensors import ROW_SCALE
from worker.formats.source import Target

# Where the older layout kept what the newer calls by the name on the right.
_OLDER_NAMES = (
    (r"vision_encoder\.encoder\.model\.visual\.patch_embed\.linear\.", "vision.patch_emb."),
    (r"vision_encoder\.encoder\.model\.visual\.pos_embed$", "vision.pos_emb"),
    (r"vision_encoder\.encoder\.model\.visual\.blocks\.(\d+)\.norm([12])\.", r"vision.blocks.\1.ln\2."),
    (r"vision_encoder\.encoder\.model\.visual\.blocks\.", "vision.blocks."),
    (r"vision_encoder\.encoder\.model\.visual\.norm\.", "vision.post_ln."),
    (r"vision_encoder\.projection\.mlp\.", "vision.proj_mlp."),
    (r"text_model\.transformer\.embd\.wte\.weight$", "text.wte"),
    (r"text_model\.transformer\.h\.(\d+)\.mixer\.Wqkv\.", r"text.blocks.\1.attn.qkv."),
    (r"text_model\.transformer\.h\.(\d+)\.mixer\.out_proj\.", r"text.blocks.\1.attn.proj."),
    (r"text_model\.transformer\.h\.(\d+)\.tau_(wq|wv|wqwv|alpha)$", r"text.blocks.\1.attn.tau.\2"),
    (r"text_model\.transformer\.h\.(\d+)\.gate\.", r"text.blocks.\1.mlp.router."),
    (r"text_model\.transformer\.h\.(\d+)\.mlp\.experts\.weight$", r"text.blocks.\1.mlp.fc1.weight"),
    (r"text_model\.transformer\.h\.(\d+)\.mlp\.output_experts\.weight$", r"text.blocks.\1.mlp.fc2.weight"),
    (r"text_model\.transformer\.h\.(\d+)\.moe_quant\.up_scale$", rf"text.blocks.\1.mlp.fc1{ROW_SCALE}"),
    (r"text_model\.transformer\.h\.(\d+)\.moe_quant\.down_scale$", rf"text.blocks.\1.mlp.fc2{ROW_SCALE}"),
    (r"text_model\.transformer\.h\.", "text.blocks."),
    (r"text_model\.lm_head\.ln\.", "text.post_ln."),
    (r"text_model\.lm_head\.linear\.", "text.lm_head."),
    (r"region(?:_model)?\.coord(?:inate)?_features\.weight$", "region.coord_features"),
    (r"region(?:_model)?\.size_features\.weight$", "region.size_features"),
    (r"region(?:_model)?\.coordinate_(encoder|decoder)\.", r"region.coord_\1."),
    (r"region_model\.coordinate_head\.", "region.coord_decoder."),
    (r"region_model\.size_head\.", "region.size_decoder."),
    (r"region_model\.", "region."),
)
_STACKED = re.compile(rf"^text\.blocks\.\d+\.mlp\.fc[12](\.weight|{re.escape(ROW_SCALE)})$")
_COMPUTED = re.compile(r"(^|\.)(freqs_cis|attn_mask|kv_cache\.\w+|rotary_emb\.inv_freq)$")


def canonical_name(stored: str) -> Target | None:
    """A stored tensor's name in either layout → its name without `model.`; None for tensors that are computed here."""
    name = stored.replace("._orig_mod", "").removeprefix("model.")
    if _COMPUTED.search(name):
        return None
    transposed = False
    for pattern, replacement in _OLDER_NAMES:
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            # The older layout kept the Fourier frequencies as a linear layer's weight.
            name, transposed = renamed, renamed in ("region.coord_features", "region.size_features")
            break
    # All experts of a layer are one tensor, and one matrix here; of other layers these are one anyway, or its scales.
    return Target(name, transposed, joined=_STACKED.search(name) is not None)
