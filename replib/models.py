"""Load any Hugging Face decoder, find its parts by structure, render chats and locate prompt and response tokens.

ChatModel
├── blocks       the decoder blocks; block i writes resid_post[i]
├── final_norm   applied once after the last block
├── unembed      final_norm(resid_post[-1]) -> logits
└── tokenizer, render, encode, forward, generate, adapter_off
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from replib.errors import ReplibError
from replib.progress import watched
from replib.settings import data_dir

logger = logging.getLogger(__name__)

MARK = "\ue000"  # a private-use character: stands for the instruction while a template is taken apart
ANATOMY_HINT = (
    "Name them: load(..., anatomy=Anatomy(blocks='model.layers', final_norm='model.norm', unembed='lm_head'))"
)


@dataclass(frozen=True)
class Anatomy:
    """Dotted paths, from the causal LM, of the parts that are read and edited."""

    blocks: str
    final_norm: str
    unembed: str


@dataclass
class Batch:
    """Left-padded token ids with the masks that say which token is what. All ``[rows, tokens]``."""

    input_ids: Int[Tensor, "rows tokens"]
    attention_mask: Int[Tensor, "rows tokens"]
    position_ids: Int[Tensor, "rows tokens"]
    prompt_mask: Bool[Tensor, "rows tokens"]
    """Template and instruction, up to where the response begins."""
    post_mask: Bool[Tensor, "rows tokens"]
    """Template tokens after the instruction (part of the prompt)."""
    response_mask: Bool[Tensor, "rows tokens"]

    @property
    def last_prompt(self) -> Int[Tensor, " rows"]:
        """Column of each row's last prompt token."""
        columns = torch.arange(self.prompt_mask.shape[1], device=self.prompt_mask.device)
        return (self.prompt_mask * columns).amax(dim=1)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def inputs(self) -> dict[str, Tensor]:
        """What the model itself takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


class ChatModel:
    """A decoder with its tokenizer: what every other module reads, edits and trains.

    ``model`` is the causal LM, or the PeftModel around it when an adapter is loaded.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, name: str, **about: Any):
        self.model: Any = model  # torch types the attributes of a module as tensors
        self.tokenizer, self.name = tokenizer, name
        self.revision: str | None = about.get("revision")
        self.adapter: str | None = about.get("adapter")
        self.template: str | None = about.get("template", tokenizer.chat_template)
        self.reading: Batch | None = None  # the batch in the forward pass: tells edits where the prompt ends
        self.rebind(about.get("anatomy"))

    def rebind(self, anatomy: Anatomy | None = None) -> None:
        """Find blocks, final norm and unembedding again, for example after an adapter was attached."""
        self.anatomy = anatomy or find_anatomy(self.causal_lm)
        self.blocks: list[nn.Module] = list(_resolve(self.causal_lm, self.anatomy.blocks))
        self.final_norm = _resolve(self.causal_lm, self.anatomy.final_norm)
        self.unembed = _resolve(self.causal_lm, self.anatomy.unembed)

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model itself, inside an adapter or not."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return _text_config(self.causal_lm.config).hidden_size

    @property
    def device(self) -> torch.device:
        """Device of the first parameter; inputs go there."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def context(self) -> int:
        """Longest sequence in tokens."""
        config = _text_config(self.causal_lm.config)
        return getattr(config, "max_position_embeddings", None) or 1 << 30

    def provenance(self) -> dict[str, str]:
        """What a result must carry about the model that gave it."""
        return {
            "model": self.name,
            "revision": self.revision or "",
            "adapter": self.adapter or "",
            "fingerprint": fingerprint(self.causal_lm),
            "template": hashlib.sha256((self.template or "").encode()).hexdigest()[:16],
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    # ----------------------------------------------------------------------------------------- text to tokens
    def render(self, prompt: str, response: str = "", *, system: str | None = None) -> str:
        """The chat text of one user turn, ready to be answered, and the beginning of its answer."""
        if self.template is None:
            return "\n\n".join(filter(None, [system, prompt])) + response
        system_turn = [{"role": "system", "content": system}] if system else []
        turns = [*system_turn, {"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        return text + response

    def encode(
        self, prompts: Sequence[str], responses: Sequence[str] | None = None, *, system: str | None = None
    ) -> Batch:
        """Tokens and masks of prompts (and their responses), padded on the left.

        Raises ReplibError for an empty list, an empty prompt, or one longer than the context.
        """
        if not prompts:
            raise ReplibError("No prompts were given: pass at least one.")
        rows = [self._row(p, r, system) for p, r in zip(prompts, responses or [""] * len(prompts), strict=True)]
        self._check_lengths(rows)
        return _pad(rows, self._pad_id()).to(self.device)

    def _row(self, prompt: str, response: str, system: str | None) -> tuple[list[int], int, int]:
        if not prompt.strip():
            raise ReplibError("A prompt is empty: remove it or give it text.")
        text = self.render(prompt, system=system)
        plain = self.template is None  # then the tokenizer adds its own special tokens; a template writes them
        found = self.tokenizer(text, add_special_tokens=plain, return_offsets_mapping=self.tokenizer.is_fast)
        ids = list(found["input_ids"])
        answer = self.tokenizer(response, add_special_tokens=False)["input_ids"] if response else []
        return ids + list(answer), len(ids), self._post_start(found, text, len(ids))

    def _post_start(self, found: Any, text: str, count: int) -> int:
        """Index of the first template token after the instruction."""
        suffix = self.render(MARK).rpartition(MARK)[2]
        if not suffix:
            return count
        if not self.tokenizer.is_fast:
            return count - len(self.tokenizer(suffix, add_special_tokens=False)["input_ids"])
        cut = len(text) - len(suffix)
        return next((i for i, (start, _) in enumerate(found["offset_mapping"]) if start >= cut), count)

    def _check_lengths(self, rows: Sequence[tuple[list[int], int, int]]) -> None:
        worst = max(range(len(rows)), key=lambda i: len(rows[i][0]))
        if len(rows[worst][0]) > self.context:
            raise ReplibError(
                f"Prompt {worst} has {len(rows[worst][0])} tokens, but {self.name} reads at most {self.context}. "
                "Shorten or drop it."
            )

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.tokenizer.eos_token_id or 0)

    # ----------------------------------------------------------------------------------------- running
    @contextmanager
    def reading_batch(self, batch: Batch) -> Iterator[None]:
        """Make ``batch`` known to hooks while it is in the forward pass."""
        before, self.reading = self.reading, batch
        try:
            yield
        finally:
            self.reading = before

    def forward(self, batch: Batch) -> Float[Tensor, "rows tokens vocab"]:
        """Next-token logits of a batch."""
        with self.reading_batch(batch):
            return self.model(**batch.inputs(), use_cache=False).logits

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 48,
        prefills: Sequence[str] | None = None,
        batch_size: int = 64,
    ) -> list[str]:
        """Greedy answers, in the order of the prompts; a prefill is where the answer is made to begin.

        The prefill is part of the returned answer. Prompts are sorted by length inside, so padding is small.
        """
        prefills = prefills or [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(prefills[i]))
        answers = [""] * len(prompts)
        for chunk in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            batch = self.encode([prompts[i] for i in chunk], [prefills[i] for i in chunk])
            for i, text in zip(chunk, self._continue(batch, max_new_tokens), strict=True):
                answers[i] = prefills[i] + text
        return answers

    def _continue(self, batch: Batch, max_new_tokens: int) -> list[str]:
        with self.reading_batch(batch), evaluating(self.model):
            out = self.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self._pad_id(),
            )
        return self.tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)

    def adapter_off(self) -> AbstractContextManager:
        """Context in which the model is its own base: the adapter, if any, is switched off."""
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside; afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _pad(rows: Sequence[tuple[list[int], int, int]], pad: int) -> Batch:
    width = max(len(ids) for ids, _, _ in rows)
    left = torch.tensor([[width - len(ids)] for ids, _, _ in rows])
    prompt = left + torch.tensor([[n] for _, n, _ in rows])
    post = left + torch.tensor([[p] for _, _, p in rows])
    column = torch.arange(width)[None]
    real = column >= left
    return Batch(
        input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids, _, _ in rows]),
        attention_mask=real.long(),
        position_ids=(column - left).clamp(min=0),
        prompt_mask=real & (column < prompt),
        post_mask=(column >= post) & (column < prompt),
        response_mask=column >= prompt,
    )


# --------------------------------------------------------------------------------------------- parts by structure
def find_anatomy(model: Any) -> Anatomy:
    """Blocks: the module list as long as the config says; norm: its last norm sibling; unembedding: the output head."""
    depth = _text_config(model.config).num_hidden_layers
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    head = model.get_output_embeddings()
    if not lists or head is None:
        raise ReplibError(f"Cannot find the {depth} decoder blocks of {type(model).__name__}. {ANATOMY_HINT}")
    blocks = min(lists, key=len)
    parent = blocks.rpartition(".")[0]
    norms = [n for n, m in _resolve(model, parent).named_children() if "norm" in type(m).__name__.lower()]
    if not norms:
        raise ReplibError(f"Cannot find the final norm of {type(model).__name__}. {ANATOMY_HINT}")
    unembed = next(n for n, m in model.named_modules() if m is head)
    return Anatomy(blocks, f"{parent}.{norms[-1]}".lstrip("."), unembed)


def _resolve(model: nn.Module, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ReplibError(f"{type(model).__name__} has no part {path!r}. {ANATOMY_HINT}") from error


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def fingerprint(model: Any) -> str:
    """Sixteen hex digits that change when the base weights do, with or without an adapter on them.

    A hash of 512 entries each of the first, the middle and the last two weights.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    weights = [p for n, p in model.named_parameters() if "lora_" not in n]
    for weight in (weights[0], weights[len(weights) // 2], weights[-2], weights[-1]):
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 512)][:512]
        digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------- loading
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


# --------------------------------------------------------------------------------------------- self-check
@torch.no_grad()
def self_check(
    model: ChatModel, prompts: Sequence[str] = ("Hello.", "What is the opposite of hot, please?")
) -> dict[str, float]:
    """Three numbers that should be near zero, and the residual scale that decides how losses must be weighted.

    Returns:
        ``padded``: worst logit difference between a padded batch and single prompts; ``lens``: between
        unembed(final_norm(last block)) and the logits (nonzero where logits are soft-capped or scaled);
        ``adapter_off``: between adapter off and adapter on (0.0 without an adapter: it should be large, not small);
        ``residual_norm``: mean norm of resid_post at half depth, last prompt token.
    """
    from replib.activations import capture

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
