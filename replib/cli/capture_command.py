"""``replib capture``: activations of prompts, written to a folder."""

from pathlib import Path
from typing import Annotated, Any, Literal

from replib.cli import options
from replib.cli.options import Given
from replib.core.settings import Settings


def run_capture(  # noqa: PLR0913
    *,
    settings: Given,
    prompts: str | None = None,
    name: str | None = None,
    site: Annotated[list[str] | None, options.SITE_NAMES] = None,
    layers: Annotated[list[int] | None, options.LAYERS] = None,
    positions: Annotated[str | int | list[str | int], options.EDIT_POSITIONS] = "last_prompt",
    pool: Annotated[Literal["mean", "none"], options.WORD] = "mean",
    max_new_tokens: Annotated[int, options.whole_number(0)] = 0,
    system: str | None = None,
    overflow: Annotated[Literal["refuse", "truncate"], options.WORD] = "refuse",
    shard: Annotated[int, options.whole_number(1)] = 1024,
    stored_dtype: Annotated[Literal["float32", "bfloat16"], options.WORD] = "float32",
) -> Path:
    """Write activations of prompts to a folder; under torchrun several processes share the work.

    Args:
        settings: model, adapter, prompts by class, batch size and output folder.
        prompts: a set or a file instead of the harmful and the harmless set; its own labels are kept.
        name: name of the folder in OUT/activations; default that of the model (and the adapter).
        site: one or several of resid_pre, attn_in, attn_out, resid_mid, mlp_in, mlp_out, resid_post (the default).
        layers: block indices, negative ones from the end; default all.
        positions: last_prompt, instruction, post_instruction, prompt, response, all, or integers counted from where the
            response begins.
        pool: mean gives one vector a span; none gives every token of one span.
        max_new_tokens: tokens that the model writes first, read as the response.
        system: system prompt before each prompt.
        overflow: treatment of a prompt longer than the context.
        shard: prompts a file.
        stored_dtype: of the values on disk; bfloat16 takes half the size.
    """
    import torch

    from replib.activations.capture import capture_cost, capture_to, finish_capture
    from replib.core.distributed import is_first, own_device, together
    from replib.models.hooks import check_site
    from replib.models.load import load
    from replib.models.tokens import check_positions

    for one in site or ():  # before a large model is loaded
        check_site(one)
    check_positions(positions if isinstance(positions, list) else [positions])
    how: dict[str, Any] = {"layers": layers, "positions": positions, "pool": pool, "max_new_tokens": max_new_tokens}
    how |= {"system": system, "overflow": overflow, "shard": shard, "batch_size": settings.batch}
    how |= {"site": site} if site else {}
    how["dtype"] = {"float32": torch.float32, "bfloat16": torch.bfloat16}[stored_dtype]
    with together() as part:
        texts, labels = _texts(settings, prompts)
        own: dict[str, Any] = {"labels": labels if any(labels) else ()}
        model = load(settings.model, adapter=settings.adapter, device=own_device(settings.device), dtype=settings.dtype)
        folder = settings.out / "activations" / (name or _model_name(settings))
        if is_first():
            print(f"{capture_cost(model, texts, folder, **how)}: {folder}", flush=True)
        capture_to(model, texts, folder, part=part, **own, **how)
    if part[1] > 1 and is_first():
        finish_capture(model, texts, folder, **own, **how)
    return folder


def _texts(settings: Settings, source: str | None) -> tuple[list[str], list[str | None]]:
    """Prompts and labels of a source, or of both classes, labelled by class."""
    from replib.data.prompts import load_prompts
    from replib.data.splits import check_world

    choice: dict[str, Any] = {"limit": settings.limit or None, "seed": settings.seed}
    if source:
        records = load_prompts(source, **choice)
    else:
        check_world(settings)
        records = load_prompts(settings.harmful, label="harmful", **choice)
        records += load_prompts(settings.harmless, label="harmless", **choice)
    return [r.text for r in records], [r.label for r in records]


def _model_name(settings: Settings) -> str:
    return "+".join(Path(folder).name for folder in (settings.model, settings.adapter) if folder)
