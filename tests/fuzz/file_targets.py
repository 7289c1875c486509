"""Owns the fuzzing of a model's files: config.json of every family, safetensors and GGUF headers. All below a folder of its own."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any, Final, cast

import torch

from tests.fuzz.targets import Target, bodies_of, bytes_of
from worker.formats.errors import CheckpointError
from worker.formats.folder import Folder
from worker.formats.gguf import Gguf
from worker.formats.safetensors import ROW_SCALE, Checkpoint
from worker.formats.source import Source
from worker.models.registry import family_of
from worker.models.settings import Settings

_CPU: Final = torch.device("cpu")
_SIZES: Final[dict[str, Any]] = {
    "vocab_size": 160, "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": [2, 3], "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16", "rope_theta": 1e4, "attention_bias": False,
}  # fmt: skip
_LONGROPE: Final = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
_VISION: Final[dict[str, Any]] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
    "num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip


def _sound(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {**_SIZES, "model_type": model_type, "architectures": [architecture], **more}


CONFIGS: Final[tuple[dict[str, Any], ...]] = (
    _sound("llama", "LlamaForCausalLM", rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
    _sound("llama", "LlamaForCausalLM", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}),
    _sound("qwen2", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=12, max_window_layers=1),
    _sound("qwen3", "Qwen3ForCausalLM", head_dim=16),
    _sound("qwen3_moe", "Qwen3MoeForCausalLM", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True, decoder_sparse_step=2, mlp_only_layers=[0]),
    _sound("mistral", "MistralForCausalLM", sliding_window=12, degas={"context_tokens": 100, "model_id": "m"}),
    _sound("smollm3", "SmolLM3ForCausalLM", no_rope_layers=[1, 0, 1]),
    _sound("phi3", "Phi3ForCausalLM", rope_scaling=_LONGROPE, original_max_position_embeddings=128, partial_rotary_factor=0.75),
    _sound("gemma2", "Gemma2ForCausalLM", head_dim=16, sliding_window=12, query_pre_attn_scalar=24, final_logit_softcapping=30.0, attn_logit_softcapping=50.0, hidden_activation="gelu_pytorch_tanh"),
    _sound("gemma3_text", "Gemma3ForCausalLM", head_dim=16, sliding_window=12, layer_types=["sliding_attention"] * 2 + ["full_attention"], rope_local_base_freq=1e4, hidden_activation="gelu_pytorch_tanh"),
    _sound("olmo2", "Olmo2ForCausalLM"),
    _sound("granite", "GraniteForCausalLM", embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.1, logits_scaling=8.0),
    _sound("stablelm", "StableLmForCausalLM", use_qkv_bias=True, layer_norm_eps=1e-5, partial_rotary_factor=0.25),
    _sound("lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention", "conv"], conv_L_cache=3, conv_bias=False, block_multiple_of=16, norm_eps=1e-5),
    {"model_type": "smolvlm", "architectures": ["SmolVLMForConditionalGeneration"], "image_token_id": 100, "scale_factor": 2, "text_config": _sound("llama", "LlamaForCausalLM"), "vision_config": _VISION},
    {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "image_token_index": 100, "mm_tokens_per_image": 4, "text_config": _sound("gemma3_text", "Gemma3ForCausalLM"), "vision_config": _VISION},
    {"model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"], "image_token_id": 100, "downsample_ratio": 0.5, "text_config": _sound("qwen2", "Qwen2ForCausalLM"), "vision_config": {**_VISION, "image_size": [56, 56], "patch_size": [14, 14]}},
    {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 100, "text_config": _sound("qwen3_vl_text", "Qwen3VLTextModel"), "vision_config": {**_VISION, "depth": 2, "num_heads": 4, "out_hidden_size": 96, "spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [0]}},
    {"model_type": "lfm2_vl", "architectures": ["Lfm2VlForConditionalGeneration"], "image_token_id": 100, "downsample_factor": 2, "text_config": _sound("lfm2", "Lfm2ForCausalLM"), "vision_config": _VISION},
    {"model_type": "moondream1", "architectures": ["HfMoondream"], "config": {"text": {"dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "vocab_size": 160}, "vision": {"enc_dim": 32, "enc_n_heads": 2}, "tokenizer": {"bos_id": 0}}},
)  # fmt: skip


class _WeightsReached(Exception):
    """A config.json was read to its end: its family asks for the first tensor."""


class _Files:
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="degas-fuzz-")
        self.path = Path(self._folder.name)
        (self.path / "model").mkdir()
        (self.path / "weights").mkdir()
        vocabulary = {chr(97 + i % 26) * (1 + i // 26): i for i in range(160)}
        self._write("tokenizer.json", {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}})
        pictures: dict[str, Any] = {
            "size": {"longest_edge": 56, "height": 56, "width": 56},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "max_image_size": {"longest_edge": 56},
            "encoder_patch_size": 14,
            "tile_size": 56,
        }
        self._write("preprocessor_config.json", pictures)  # fmt: skip
        self._write("tokenizer_config.json", {"bos_token": "a", "eos_token": {"content": "b"}})

    def _write(self, name: str, values: dict[str, Any]) -> None:
        (self.path / "model" / name).write_text(json.dumps(values))

    def config(self, data: bytes) -> object:
        """A folder of which config.json is odd, up to its weights."""
        folder = self.path / "model"
        (folder / "config.json").write_bytes(data)
        source = cast(Source, Folder(folder))

        def reached(*_: object) -> None:
            raise _WeightsReached

        source.open = reached  # type: ignore[method-assign, assignment]
        return family_of(Settings(source.config, source.settings_file)).load(
            source, _CPU, torch.float32, lambda *_: None
        )

    def generation(self, data: bytes) -> object:
        """The smaller files of a folder: generation_config.json and tokenizer_config.json."""
        folder = self.path / "model"
        for name in ("generation_config.json", "tokenizer_config.json"):
            (folder / name).write_bytes(data)
        try:
            return self.config(json.dumps(CONFIGS[0]).encode())
        finally:
            (folder / "generation_config.json").unlink()
            self._write("tokenizer_config.json", {})

    def safetensors(self, data: bytes) -> None:
        """A file of weights: its header, and a tensor of it."""
        (self.path / "weights" / "model.safetensors").write_bytes(data)
        found = Checkpoint(self.path / "weights", lambda *_: None)
        for name, shape in (("a", (2, 3)), ("b", (4,)), ("c.weight", (4, 8))):
            if name in found:
                found.take(name, *shape, device=_CPU, dtype=torch.float32)
        found.finish()

    def gguf(self, data: bytes) -> object:
        """A GGUF file: what it says of itself, its settings, tokenizer and templates."""
        file = self.path / "model.gguf"
        file.write_bytes(data)
        source = Gguf(file)
        source.tokenizer()
        return source.end_tokens(), source.special_tokens(), source.templates


def _safetensors() -> bytes:
    """Plain tensors, and one in FP8 with a scale a row."""
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c.weight": {"dtype": "F8_E4M3", "shape": [4, 8], "data_offsets": [32, 64]},
        f"c{ROW_SCALE}": {"dtype": "F32", "shape": [4], "data_offsets": [64, 80]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(80)


def _gguf() -> bytes:
    """A whole, small llama in version 3: settings of every kind, a vocabulary, two tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def entry(key: str, kind: int, value: bytes) -> bytes:
        return text(key) + struct.pack("<I", kind) + value

    def listed(kind: int, values: list[bytes]) -> bytes:
        return struct.pack("<IQ", kind, len(values)) + b"".join(values)

    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["<s>", "</s>", "a", "b"]
    sizes = {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 32,
        "attention.head_count": 2,
    }
    entries = [
        entry("general.architecture", 8, text("llama")),
        *(entry(f"llama.{name}", 4, struct.pack("<I", value)) for name, value in sizes.items()),
        entry("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
        entry("tokenizer.ggml.model", 8, text("llama")),
        entry("tokenizer.ggml.tokens", 9, listed(8, [text(token) for token in tokens])),
        entry("tokenizer.ggml.scores", 9, listed(6, [struct.pack("<f", -float(i)) for i in range(len(tokens))])),
        entry("tokenizer.ggml.token_type", 9, listed(5, [struct.pack("<i", 6 if i < 256 else 1) for i in range(len(tokens))])),
        entry("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 257)),
        entry("tokenizer.ggml.add_bos_token", 7, b"\1"),
        entry("tokenizer.chat_template", 8, text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")),
    ]  # fmt: skip
    tensors = [
        text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 260, 8, 0),  # Q8_0: 34 bytes a block of 32
        text("output_norm.weight") + struct.pack("<IQIQ", 1, 32, 0, 260 * 34 + 24),
    ]
    head = (
        b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries) + b"".join(tensors)
    )
    return head + bytes(-len(head) % 32) + bytes(260 * 34 + 24 + 128)


def file_targets() -> list[Target]:
    """Files of models."""
    files = _Files()
    said = ({"eos_token_id": [5, 2], "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "min_p": 0.05, "bos_token": "a", "eos_token": {"content": "b"}, "added_tokens_decoder": {"1": {"content": "a", "special": True}}},)  # fmt: skip
    refused = (CheckpointError, _WeightsReached)
    return [
        Target("config", bodies_of(CONFIGS), files.config, refused),
        Target("generation-config", bodies_of(said), files.generation, refused),
        Target("safetensors", bytes_of((_safetensors(),)), files.safetensors, (CheckpointError,)),
        Target("gguf", bytes_of((_gguf(),)), files.gguf, (CheckpointError,)),
    ]
