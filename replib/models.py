"""Load any Hugging Face decoder with its tokenizer and, on top, a LoRA adapter; say clearly what is missing."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from replib.activations import capture
from replib.anatomy import Anatomy, fingerprint
from replib.chat import ChatModel
from replib.errors import ReplibError
from replib.progress import watched
from replib.settings import data_dir

__all__ = ["Anatomy", "ChatModel", "attached", "fingerprint", "load", "merged", "self_check"]


def load(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    template: str = "auto",
    anatomy: Anatomy | None = None,
) -> ChatModel:
    """Load an organism variant, a local folder or a Hugging Face id, with an optional LoRA adapter on top.

    Args:
        name: "base", "aligned", "planted", "deep" (the organism), a folder, or a hub id.
        adapter: folder of a LoRA adapter trained on exactly this model.
        revision: commit or tag of a hub id.
        dtype: default float32 on CPU, bfloat16 on an accelerator.
        device: "cpu", "cuda", ...; "auto" spreads a large model over the devices; default the first accelerator.
        template: "auto" (the tokenizer's chat template, or plain text with a warning where it has none),
            "chat" (refuse if there is none), "plain", or a Jinja template.
        anatomy: where blocks, final norm and unembedding are, if they cannot be found.

    Raises:
        ReplibError: missing folder or id, no tokenizer, no chat template, not a causal LM, foreign adapter.
    """
    if not watched():
        disable_progress_bar()
    source = _locate(str(name))
    config = _config(source, revision)
    tokenizer = _tokenizer(source, revision)
    target = device or _default_device()
    dtype = dtype or (torch.float32 if target == "cpu" else torch.bfloat16)
    model = _weights(source, revision, config, dtype, target)
    chat = ChatModel(
        model.eval(),
        tokenizer,
        name=str(name),
        revision=revision or getattr(config, "_commit_hash", None),
        anatomy=anatomy,
    )
    chat.template = _template(tokenizer, template, str(name))
    return chat if adapter is None else attached(chat, Path(adapter))


def _default_device() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def _locate(name: str) -> str:
    """An existing folder, an organism variant by its bare name, or an id left for the hub."""
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
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False, padding_side="left")
    except (OSError, ValueError) as error:
        raise ReplibError(
            f"Cannot load the tokenizer of {source!r}: {str(error).splitlines()[0]} "
            "Save it beside the weights: tokenizer.save_pretrained(folder)."
        ) from error


def _weights(source: str, revision: str | None, config: Any, dtype: Any, device: str) -> nn.Module:
    placement = {"device_map": "auto"} if device == "auto" else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, config=config, dtype=dtype, trust_remote_code=False, **placement
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ReplibError(
            f"{source!r} is a {config.model_type!r} model, not a causal language model: "
            "replib reads decoders that transformers' AutoModelForCausalLM can load."
        ) from error
    except OSError as error:
        raise ReplibError(
            f"Cannot load weights from {source!r}: {str(error).splitlines()[0]} "
            "The folder must hold *.safetensors files made by save_pretrained."
        ) from error
    return model if placement else model.to(device)


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


def attached(model: ChatModel, folder: Path) -> ChatModel:
    """The model with a saved LoRA adapter on top; the weights are shared, and ``adapter_off`` gives the base back.

    Raises:
        ReplibError: no adapter in the folder, or one that was trained on another base.
    """
    from peft import PeftModel

    if not (folder / "adapter_config.json").exists():
        raise ReplibError(
            f"{str(folder)!r} holds no adapter_config.json: pass the folder that `replib bend` or "
            "peft's save_pretrained wrote."
        )
    card = folder / "replib.json"
    expected = json.loads(card.read_text()).get("fingerprint") if card.exists() else None
    if expected not in (None, found := fingerprint(model.causal_lm)):
        raise ReplibError(
            f"The adapter in {str(folder)!r} was trained on another model (base fingerprint {expected}, this one "
            f"is {found}). Load the base it names in {card.name}."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers, nothing a user can do
            peft_model = PeftModel.from_pretrained(model.causal_lm, folder)
    except (RuntimeError, ValueError) as error:
        raise ReplibError(
            f"The adapter in {str(folder)!r} does not fit this model: {str(error).splitlines()[0]} "
            "Load the base model that its adapter_config.json names."
        ) from error
    return ChatModel(
        peft_model.eval(),
        model.tokenizer,
        name=model.name,
        revision=model.revision,
        adapter=str(folder),
        template=model.template,
        anatomy=model.anatomy,
    )


def merged(model: ChatModel) -> ChatModel:
    """The bent model with its adapter added into the weights: half the work a pass, the same logits up to rounding.

    For inference only: the model that is given is used up, and ``adapter_off`` of the merged one raises.
    """
    if not hasattr(model.model, "merge_and_unload"):
        raise ReplibError(f"{model.name} carries no adapter to merge.")
    return ChatModel(
        model.model.merge_and_unload().eval(),
        model.tokenizer,
        name=model.name,
        revision=model.revision,
        adapter=model.adapter,
        template=model.template,
        anatomy=model.anatomy,
    )


# --------------------------------------------------------------------------------------------- self-check
@torch.no_grad()
def self_check(
    model: ChatModel, prompts: Sequence[str] = ("Hello.", "What is the opposite of hot, please?")
) -> dict[str, float]:
    """Two numbers that should be near zero, what the adapter does, and the residual scale that losses are weighed by.

    Returns:
        ``padded``: worst logit difference between a padded batch and single prompts; ``lens``: between
        unembed(final_norm(last block)) and the logits (nonzero where logits are soft-capped or scaled);
        ``adapter_effect``: between adapter off and adapter on (0.0 without an adapter, and large with one);
        ``residual_norm``: mean norm of resid_post at half depth, last prompt token.
    """
    batch = model.encode(prompts)
    logits = model.forward(batch)[:, -1].float()
    singles = torch.cat([model.forward(model.encode([p]))[:, -1] for p in prompts]).float()
    last = capture(model, prompts, layers=[model.n_layers - 1]).values[0].to(model.device, model.dtype)
    lens = model.unembed(model.final_norm(last)).float()
    with model.adapter_off():
        base = model.forward(batch)[:, -1].float()
    middle = capture(model, prompts, layers=[model.n_layers // 2]).values[0]
    return {
        "padded": (logits - singles).abs().max().item(),
        "lens": (logits - lens).abs().max().item(),
        "adapter_effect": (logits - base).abs().max().item(),
        "residual_norm": middle.norm(dim=-1).mean().item(),
    }
