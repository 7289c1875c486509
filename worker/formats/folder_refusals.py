"""Owns saying what a folder is that holds no weights we can serve, and what to do about it. Any thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worker.formats.errors import CheckpointError
from worker.formats.json_files import read_object
from worker.formats.lfs import refuse_pointer

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# quantization_config's `quant_method` → what people call it.
_QUANTISED = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (fbgemm)",
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
    "modelopt": "ModelOpt",
    "quark": "Quark",
    "auto-round": "AutoRound",
    "eetq": "EETQ",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quanto": "Quanto",
    "torchao": "torchao",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "bitnet": "BitNet",
    "vptq": "VPTQ",
    "higgs": "HIGGS",
}
_INSTEAD = "take the model's own folder in bf16, or a GGUF file of it (Q4_K_M, Q8_0)"


def refuse_settings(folder: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError where config.json, or a file beside it, says that the weights are of an unsupported kind."""
    file = folder / "config.json"
    method = config.get("quantization_config") or config.get("compression_config")
    if isinstance(config.get("quantization"), dict) and "group_size" in config["quantization"]:
        bits = config["quantization"].get("bits")
        raise CheckpointError(
            f"an MLX folder ('quantization', {bits} bits): weights for Apple's MLX alone; {_INSTEAD}",
            file=file,
        )
    if method:
        named = method.get("quant_method") if isinstance(method, dict) else method
        called = _QUANTISED.get(str(named), repr(named))
        raise CheckpointError(
            f"'quantization_config' says {called}: weights quantised so are not served; {_INSTEAD}", file=file
        )
    for name in ("quantize_config.json", "quant_config.json"):
        if (folder / name).is_file():
            bits = read_object(folder / name).get("bits", read_object(folder / name).get("w_bit"))
            raise CheckpointError(
                f"weights quantised to {bits} bits (GPTQ or AWQ) are not served; {_INSTEAD}",
                file=folder / name,
            )


def refuse_folder(folder: Path, problem: str) -> CheckpointError:
    """The error to raise for a folder that has `problem`; it names the cause if other files in the folder show one."""
    if not folder.exists():
        return CheckpointError("no such folder", file=folder)
    if not folder.is_dir():
        return CheckpointError("not a folder", file=folder)
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        adapter = folder / "adapter_config.json"
        base = read_object(adapter).get("base_model_name_or_path") or "its base model"
        return CheckpointError(
            f"a LoRA adapter, not a model: merge it into {base} (peft: merge_and_unload, save_pretrained) and serve "
            "that folder",
            file=adapter,
        )
    for name in names:
        if name.endswith(".safetensors"):
            refuse_pointer(folder / name)
    if "model_index.json" in names:
        return CheckpointError("a diffusers pipeline, not a language model", file=folder)
    if "consolidated.safetensors" in names or "params.json" in names:
        return CheckpointError(
            f"{problem}: the release in its makers' own layout (consolidated files, params.json); take the folder "
            "in Hugging Face's layout (config.json, model*.safetensors)",
            file=folder,
        )
    pickled = next((name for name in names if name.endswith(PICKLES)), None)
    if pickled is not None:
        return CheckpointError(
            f"{problem}: only pickled weights here ({pickled}); pickles can run code, so convert them to safetensors, or "
            "take a release that has them",
            file=folder,
        )
    if any((folder / "original").glob("*.pth")):
        return CheckpointError(
            f"{problem}: only original/*.pth here, pickles that can run code; download model*.safetensors too",
            file=folder,
        )
    if any(name.endswith(".onnx") for name in names) or any((folder / "onnx").glob("*.onnx")):
        return CheckpointError(
            f"{problem}: only ONNX weights here; download model*.safetensors too", file=folder
        )
    if any(name.endswith((".npz", ".mlx")) for name in names):
        return CheckpointError(
            f"{problem}: an MLX folder, which Apple's MLX alone reads; {_INSTEAD}", file=folder
        )
    if any(name.endswith((".msgpack", ".h5")) for name in names):
        return CheckpointError(f"{problem}: only Flax or TensorFlow weights here; {_INSTEAD}", file=folder)
    if any(name.endswith((".safetensors", ".json")) for name in names):
        return CheckpointError(f"{problem}: the download is incomplete", file=folder)
    inner = [path.name for path in sorted(folder.iterdir()) if (path / "config.json").is_file()]
    if inner:
        return CheckpointError(f"{problem}; there is one in {', '.join(inner[:5])}: serve that", file=folder)
    return CheckpointError(problem, file=folder)
