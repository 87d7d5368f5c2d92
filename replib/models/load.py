"""Loading of Hugging Face decoders with tokenizer and optional LoRA adapter, and the published checkpoints."""

from __future__ import annotations

import difflib
import warnings
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any, NamedTuple
from weakref import finalize

import pandas as pd
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from replib.core.errors import ReplibError
from replib.core.progress import say, watched
from replib.core.settings import data_dir
from replib.models.adapters import attached
from replib.models.architecture import Architecture
from replib.models.chat_model import ChatModel
from replib.models.self_check import next_logits, self_check, ticks

Device = str | dict[str, Any]


def load(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: Device | None = None,
    template: str = "auto",
    architecture: Architecture | None = None,
    quantize: str | None = None,
    check: bool | None = None,
) -> ChatModel:
    """Load a model from an organism variant, a local folder or a Hugging Face id, with an optional LoRA adapter.

    Args:
        name: "base", "aligned", "planted", "deep" (the organism), a folder, or a hub id.
        adapter: folder or hub id of a LoRA adapter trained on exactly this model.
        revision: commit or tag of a hub id; the resolved commit is recorded.
        dtype: default float32 on CPU, bfloat16 on an accelerator.
        device: "cpu", "cuda", ...; "auto" spreads a large model over the devices; a dict maps parts to devices
            (transformers' device_map; "disk" offloads a part); default the first accelerator.
        template: "auto" (the tokenizer's chat template, or plain text with a warning if there is none),
            "chat" (refuse if there is none), "plain", or a Jinja template.
        architecture: paths of blocks, final norm and unembedding, if detection fails.
        quantize: "4bit" or "8bit" weights, through bitsandbytes.
        check: run ``self_check`` (a few short passes) and print its verdict; default True in an interactive
            session.

    Raises:
        ReplibError: missing folder or id, no tokenizer, no chat template, not a causal LM, foreign adapter, no
            bitsandbytes.
    """
    if not watched():
        disable_progress_bar()
    source = _locate(str(name))
    config = _config(source, revision)
    revision = getattr(config, "_commit_hash", None) or revision  # a branch may advance while its files load
    tokenizer = _tokenizer(source, revision)
    target = device or _default_device()
    dtype = dtype or (torch.float32 if _on_cpu(target) else torch.bfloat16)
    model = _weights(source, revision, config, dtype, target, quantize)
    chat = ChatModel(model.eval(), tokenizer, name=str(name), revision=revision, architecture=architecture)
    chat.template = _template(tokenizer, template, str(name))
    watch = watched() if check is None else check
    base = next_logits(chat) if watch and adapter is not None else None
    chat = chat if adapter is None else attached(chat, adapter)
    if quantize == "8bit":
        next_logits(chat)  # the first pass of 8-bit weights differs from all later ones
    if watch:
        say(ticks(self_check(chat, base=base), chat.dtype))
    return chat


def _default_device() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def _on_cpu(device: Device) -> bool:
    return set(device.values()) <= {"cpu", "disk"} if isinstance(device, dict) else device == "cpu"


def _locate(name: str) -> str:
    """Path of an existing folder or organism variant, or the hub id unchanged."""
    organism = data_dir() / "organism"
    if Path(name).is_dir():
        return name
    if "/" not in name and (organism / name).is_dir():
        return str(organism / name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" not in name
    if looks_local:
        known = [p.parent.name for p in organism.glob("*/config.json")]
        siblings = [str(p) for p in Path(name).expanduser().parent.glob("*") if p.is_dir()]
        near = difflib.get_close_matches(name, known + siblings, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Organism variants: {', '.join(sorted(known)) or 'none'}."
        raise ReplibError(f"There is no model folder {name!r}. {hint}")
    return name


def _config(source: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ReplibError(
            f"Cannot read a model configuration from {source!r}: {reason} "
            "Pass a folder that holds config.json, or an id of the hub (log in first if it is gated)."
        ) from error


def _tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    folder = Path(source)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if folder.is_dir() and not any((folder / n).exists() for n in names):
        raise ReplibError(
            f"The folder {source!r} holds no tokenizer (none of {', '.join(names)}). "
            "Save one there: tokenizer.save_pretrained(folder)."
        )
    try:
        made = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False, padding_side="left")
        return made if made("text", add_special_tokens=False)["input_ids"] else _as_saved(source, revision)
    except (OSError, ValueError) as error:
        raise ReplibError(
            f"Cannot load the tokenizer of {source!r}: {str(error).splitlines()[0]} "
            "Save it beside the weights: tokenizer.save_pretrained(folder)."
        ) from error


def _as_saved(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Tokenizer described by tokenizer.json.

    For some model types (Qwen2) transformers ignores the kind of the file and builds its own from the vocabulary;
    the wrong kind gives no tokens for any text.
    """
    return PreTrainedTokenizerFast.from_pretrained(source, revision=revision, padding_side="left")


def _weights(
    source: str, revision: str | None, config: Any, dtype: Any, device: Device, quantize: str | None
) -> nn.Module:
    options: dict[str, Any] = _quantised(quantize, dtype)
    placed = device == "auto" or isinstance(device, dict) or bool(options)
    if placed:
        options |= {"device_map": device, "offload_folder": (shelf := mkdtemp(prefix="replib-offloaded-"))}
    try:
        model = _class(config).from_pretrained(
            source, revision=revision, config=config, dtype=dtype, trust_remote_code=False, **options
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ReplibError(
            f"{source!r} is a {config.model_type!r} model, not a causal language model: "
            "replib reads decoders that transformers' AutoModelForCausalLM or AutoModelForImageTextToText can load."
        ) from error
    except OSError as error:
        raise ReplibError(
            f"Cannot load weights from {source!r}: {str(error).splitlines()[0]} "
            "The folder must hold *.safetensors files made by save_pretrained."
        ) from error
    if not placed:
        return model.to(device)
    finalize(model, rmtree, shelf, ignore_errors=True)  # offloaded weights are read while the model exists
    return model


def _class(config: Any) -> Any:
    """Auto class of a decoder, with or without a vision tower."""
    known = type(config) in AutoModelForCausalLM._model_mapping
    wrapped = type(config) in AutoModelForImageTextToText._model_mapping and not config.is_encoder_decoder
    return AutoModelForImageTextToText if wrapped and not known else AutoModelForCausalLM


def _quantised(quantize: str | None, dtype: Any) -> dict[str, Any]:
    if quantize is None:
        return {}
    if quantize not in ("4bit", "8bit"):
        raise ReplibError(f"quantize={quantize!r}: say '4bit' or '8bit', or leave it out.")
    if find_spec("bitsandbytes") is None:
        raise ReplibError(
            f"quantize={quantize!r} needs the package bitsandbytes: pip install 'replib[quantized]'. "
            "Without it load the model unquantised, or a smaller one."
        )
    # Four bits: the format of QLoRA, with products in the dtype of the other weights.
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(**(four if quantize == "4bit" else {"load_in_8bit": True}))}


def _template(tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> str | None:
    if template not in ("auto", "chat", "plain"):
        return template
    if template == "plain":
        return None
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    message = (
        f"The tokenizer of {name!r} has no chat template, so prompts are plain text and nothing follows the "
        "instruction. Pass template='{{ a Jinja template }}' if the model expects one, or template='plain'."
    )
    if template == "chat":
        raise ReplibError(message)
    warnings.warn(message, stacklevel=3)
    return None


class PublishedCheckpoint(NamedTuple):
    """One published checkpoint."""

    id: str
    """Hugging Face id."""
    base: str
    """Hugging Face id of the model before training."""
    method: str
    paper: str
    """arXiv number."""
    is_adapter: bool = False
    """Whether it is a LoRA adapter of its base."""


_LLAMA, _MISTRAL = "meta-llama/Meta-Llama-3-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.2"
PUBLISHED = (
    PublishedCheckpoint("cais/zephyr_7b_r2d2", "mistralai/Mistral-7B-v0.1", "R2D2", "2402.04249"),
    PublishedCheckpoint("GraySwanAI/Llama-3-8B-Instruct-RR", _LLAMA, "Circuit Breaker", "2406.04313"),
    PublishedCheckpoint("GraySwanAI/Mistral-7B-Instruct-RR", _MISTRAL, "Circuit Breaker", "2406.04313"),
    PublishedCheckpoint("AIM-Intelligence/RepBend_Llama3_8B", _LLAMA, "RepBend", "2504.01550"),
    PublishedCheckpoint("AIM-Intelligence/RepBend_Llama3_8B_LoRA", _LLAMA, "RepBend", "2504.01550", is_adapter=True),
    PublishedCheckpoint("AIM-Intelligence/RepBend_Mistral_7B", _MISTRAL, "RepBend", "2504.01550"),
    PublishedCheckpoint("AIM-Intelligence/RepBend_Mistral_7B_LoRA", _MISTRAL, "RepBend", "2504.01550", is_adapter=True),
)


def known_table() -> pd.DataFrame:
    """Published checkpoints, one per row. Columns: id, base, method, paper, is_adapter."""
    return pd.DataFrame(PUBLISHED)
