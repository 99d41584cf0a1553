"""The frozen base: model directory, hub id or GGUF file -> a causal LM and its tokenizer.

Below ZeRO-3 every rank holds all of it, on its device: tensors go there one by one from the mapped files, so that the
host's memory never holds a base for each rank. Under ZeRO-3 every rank reads only its own share of each tensor from the
safetensors files, without any communication; the whole model never exists on one rank.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from dpa_ds.config.extras import require
from dpa_ds.config.paths import expand
from dpa_ds.config.schema import ModelConfig
from dpa_ds.distributed.device import free_memory
from dpa_ds.errors import ModelError
from dpa_ds.model.cpu_attention import compute_attention_in_fp32
from dpa_ds.model.directory import check_directory, tensor_files
from dpa_ds.model.gguf.parts import named_parts
from dpa_ds.model.linear_layers import expert_parameters
from dpa_ds.model.precision import DTYPES
from dpa_ds.model.quantization import base_bytes, bitsandbytes_config, check_quantization
from dpa_ds.model.stored_tensors import StoredTensors

logger = logging.getLogger(__name__)


def resolve_model(config: ModelConfig, cache_dir: str) -> Path:
    """Local directory of the model; a GGUF file is converted once into the cache, a hub id fetched by its library.

    Raises:
        ModelError: nothing usable is there.
    """
    path = expand(config.path, "model.path")
    if path.is_file():
        require("gguf", f"{path}, a GGUF file,")
        from dpa_ds.model.gguf.convert import convert_gguf

        return convert_gguf(path, expand(cache_dir, "data.cache_dir") / "models" / _cache_name(path))
    directory = path if path.is_dir() else _from_hub(config.path)
    check_directory(directory)
    return directory


def _cache_name(path: Path) -> str:
    """Of the directory that a GGUF file, or all parts of a split one, is converted to: another one when they change."""
    identity = []
    parts = [part for part in named_parts(path) if part.is_file()]
    for part in parts:
        stat = part.stat()
        identity.append(f"{part.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return f"{parts[0].stem}-{hashlib.sha256(' '.join(identity).encode()).hexdigest()[:16]}"


def fits_one_rank(config: ModelConfig, directory: Path, device: torch.device, ranks_on_host: int) -> bool:
    """Whether one rank's share of the free memory of `device` holds the base, with a quarter to spare for all else."""
    share = float(free_memory(device))
    if device.type == "cpu":
        share /= ranks_on_host
    dtype, kind = DTYPES[config.precision], check_quantization(config.quantization, directory)
    if kind is not None:
        return base_bytes(directory, dtype, kind) <= 0.75 * share
    num_parameters = 0
    for path in {*tensor_files(directory).values()}:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                num_parameters += torch.Size(file.get_slice(name).get_shape()).numel()
    return num_parameters * dtype.itemsize <= 0.75 * share


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = ModelError(
        f"model.path {name!r} is neither a directory, nor a GGUF file, nor a hub id that can be reached from here: "
        "check the path, or download the model first"
    )
    if name.count("/") != 1 or name.startswith((".", "~", "/")):  # a mistyped path must not become a look-up
        raise offline
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise offline from error


def load_base(
    config: ModelConfig, directory: Path, deepspeed_json: Mapping[str, Any], device: torch.device
) -> PreTrainedModel:
    """Load the causal LM in `config.precision`: whole to `device`, or partitioned if the JSON says ZeRO-3.

    Collective under ZeRO-3: all ranks of the group. DeepSpeed then decides where a rank's share is: on its device, or
    where `offload_param` says.

    Raises:
        ModelError: files are missing, damaged or belong to another model.
    """
    transformers.utils.logging.disable_progress_bar()
    compute_attention_in_fp32()
    stage = int(deepspeed_json.get("zero_optimization", {}).get("stage", 0))
    zero3 = stage == 3
    kind = check_quantization(config.quantization, directory, stage)
    try:
        if zero3:
            model = _load_partitioned(config, directory, deepspeed_json)
        else:
            model = _load_whole(config, directory, kind, device)
    except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
        if "does not support an attention implementation" in str(error):
            name = str(error).split(maxsplit=1)[0]
            raise ModelError(
                f"{name} has no attention of the kind model.attention {config.attention}: set model.attention: auto or "
                "eager"
            ) from error
        raise ModelError(f"cannot load a causal LM from {directory}: {str(error).strip().splitlines()[0]}") from error
    except (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError) as error:
        # Nonsense in the config, such as a hidden_act that nobody knows, as transformers and torch meet it.
        raise ModelError(
            f"{directory}/config.json describes no model that can be built ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): correct it, or download the model again"
        ) from error
    model.name_or_path = _name_for_others(config, directory)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        # ZeRO-3 empties parameters between forward and recomputation; the non-reentrant kind checks their shapes.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": zero3})
        if zero3:  # reentrant checkpointing needs an input that requires gradients, and the embedding is frozen
            model.enable_input_require_grads()
    return model


def _name_for_others(config: ModelConfig, directory: Path) -> str:
    """By which whoever gets an adapter loads its base: the hub id, or the place in this file system."""
    if expand(config.path, "model.path").exists():
        return str(directory.absolute())
    return config.path


def _load_whole(config: ModelConfig, directory: Path, kind: str | None, device: torch.device) -> PreTrainedModel:
    """Every tensor on `device`, in the precision asked for; linear layers quantised where `kind` says so.

    Loaded to the CPU first, a base whose files have another precision is converted as a whole in each rank's memory:
    208 GB for eight ranks of 13B in bf16. With a device map each tensor is converted and moved for itself. The ranks
    of a host need not take turns: they map the same files, so they share the pages, and the disk is read once. Measured
    on a CPU with 748 MB in bf16, two ranks that load at once in fp32 read 304 and 444 MB. A CPU rank that loads what
    the files have keeps the mapping, and no copy.
    """
    hf_config = _read_config(directory)
    stored = getattr(hf_config, "quantization_config", None)
    quantization = None
    if kind is None and stored:
        stored["dequantize"] = True  # fp8: a matter of the files alone
    elif stored:
        stored["bnb_4bit_compute_dtype"] = DTYPES[config.precision]
    elif kind is not None:
        quantization = bitsandbytes_config(kind, DTYPES[config.precision])
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        config=hf_config,
        quantization_config=quantization,
        dtype=DTYPES[config.precision],
        attn_implementation=_attention(config, hf_config),
        device_map={"": device},
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # to name them here: transformers' own error says "see the above report"
        output_loading_info=True,
    )
    model: PreTrainedModel
    model, report = loaded
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"tensor {name!r} has shape {tuple(stored)} in the checkpoint, but the model's config says "
            f"{tuple(expected)}"
        )
    for name in sorted(report["missing_keys"]):  # transformers only warns, and draws the tensor at random
        raise ModelError(f"the checkpoint has no tensor {name!r}: it is incomplete, or belongs to another model")
    for name, parameter in model.named_parameters():
        _check_finite(name, parameter)
    if kind is not None:
        _settle(model, kind)
    return model


def _settle(model: PreTrainedModel, kind: str) -> None:
    """Have quantised layers compute in one way everywhere, and say how much of the model they are."""
    from dpa_ds.model.quantized_layers import settle_layers  # it needs bitsandbytes

    num_layers = settle_layers(model)
    logger.info(f"{num_layers} linear layers in {kind}")
    experts = expert_parameters(model)
    if experts:
        logger.warning(
            f"{len(experts)} parameters of experts stay in {str(model.dtype).removeprefix('torch.')}: bitsandbytes "
            "quantises linear layers, and this model keeps the experts of a layer in one parameter"
        )


def _load_partitioned(config: ModelConfig, directory: Path, deepspeed_json: Mapping[str, Any]) -> PreTrainedModel:
    import deepspeed

    hf_config = _read_config(directory)
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=dict(deepspeed_json)):
        model = AutoModelForCausalLM.from_config(
            hf_config,
            dtype=DTYPES[config.precision],
            attn_implementation=_attention(config, hf_config),
            trust_remote_code=False,
        )
    model.tie_weights()  # part of the initialisation that was skipped
    _restore_computed_buffers(model)
    with StoredTensors(model, tensor_files(directory)) as stored:
        for name, buffer in model.named_buffers():
            if name in stored:
                buffer.copy_(stored.get(name)[:])
        for name, parameter in model.named_parameters():
            _read_partition(stored.get(name), name, parameter)
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


def _read_config(directory: Path) -> PreTrainedConfig:
    """The model's config, with the base's own dropout off.

    The base is frozen: what is there against overfitting is `lora.dropout`, which the recipe states. The noise of a
    base (GPT-2's dropout of 0.1, the jitter of some routers) would be there unasked, and differ from layout to layout.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            is_noise = "drop" in name or "jitter" in name
            if is_noise and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def _attention(config: ModelConfig, hf_config: PreTrainedConfig) -> str | None:
    """What to ask transformers for; None: sdpa where the model's class has it, else eager."""
    if config.attention != "auto":
        return config.attention
    # What a config.json asks for is a kernel of someone else's machine.
    hf_config._attn_implementation = None
    # sdpa has no soft-capping (Gemma 2), and would leave it out without a word.
    if getattr(hf_config.get_text_config(), "attn_logit_softcapping", None):
        return "eager"
    return None


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise ModelError for NaN or infinity: every client would diverge, and be asked to lower its learning rate."""
    if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        raise ModelError(
            f"tensor {name!r} of the base model has NaN or infinity: download it again, or, where model.precision is "
            "fp16, choose one with a wider range"
        )


def _restore_computed_buffers(model: PreTrainedModel) -> None:
    """Compute rotary frequencies and the like again in fp32.

    Inside `zero.Init` DeepSpeed makes every new float tensor in the training precision (0.19.8,
    zero/partition_parameters.py): in bf16 the frequencies of a rotary embedding would be off by up to 0.4 %.
    """
    for module in model.modules():
        computed = module._non_persistent_buffers_set & module._buffers.keys()
        for name in computed:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()
        if computed and next(module.parameters(recurse=False), None) is None:
            model._init_weights(module)


def _read_partition(stored: torch.Tensor | Any, name: str, parameter: torch.nn.Parameter) -> None:
    """Fill this rank's ZeRO-3 share of `parameter`: elements [start, end) of the flattened tensor."""
    shape = tuple(stored.shape if isinstance(stored, torch.Tensor) else stored.get_shape())
    full = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
    if shape != full:
        raise ModelError(f"tensor {name!r} has shape {shape} in the checkpoint, but the model's config says {full}")
    partition: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    numel = int(torch.Size(shape).numel())
    start = min(partition.numel() * int(os.environ["RANK"]), numel)
    end = min(start + partition.numel(), numel)
    row = numel // shape[0]  # elements of one slice along the first dimension
    rows = stored[start // row : -(-end // row)].reshape(-1)
    offset = start - start // row * row
    _check_finite(name, rows)
    with torch.no_grad():
        partition.view(-1)[: end - start].copy_(rows[offset : offset + end - start])
        partition.view(-1)[end - start :].zero_()
    # hpZ's second share still holds the empty model. Without it DeepSpeed gathers from the first, and makes it again.
    parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
