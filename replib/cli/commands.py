"""The verbs of the command line: each opens a study, runs one analysis and says where its result lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from replib.ablation.fit import check_names, grid
from replib.ablation.sweep_report import SweepReport, sweep_cost
from replib.activations.capture import capture_cost, capture_to, finish_capture
from replib.core.distributed import is_first, own_device, together
from replib.core.settings import Settings
from replib.core.storage import write_text
from replib.data.prompts import Prompt, load_prompts
from replib.data.splits import check_world
from replib.defences.catalogue import Baseline
from replib.defences.repbend.presets import preset_named
from replib.defences.tuning import importances, ranges_around, tune
from replib.models.hooks import check_site
from replib.models.load import load
from replib.models.tokens import Position, check_positions
from replib.study.study import BASELINES, Study
from replib.study.training import baseline_for, defend, harden, inner_of, schedule, study_objective

SWEPT = (("pca_ot", "last_prompt"), ("pca_ot", "all"), *BASELINES)


def run_audit(settings: Settings) -> Path:
    """``replib audit``: one table, as CSV."""
    study = Study.open(settings)
    return study.audit().save(settings.out / f"audit-{Path(settings.model).name}.csv")


def run_bend(
    settings: Settings,
    *,
    preset: str | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    steps: int | None = None,
    save_every: int | None = None,
    say: Callable[[str], object] = print,
) -> Path:
    """``replib bend``: train an adapter with a preset (``replib.defences.repbend.presets``), single coefficients changed.

    Stopped or killed, the same command goes on from the last checkpoint. Under torchrun or ``accelerate launch`` (see
    ``replib/training/configs``) processes train together, each on micro-batches of its own.

    Raises:
        ReplibError: no preset has that name.
    """
    chosen = preset_named(preset) if preset else None  # before a large model is loaded
    study = Study.open(replace(settings, device=own_device(settings.device)))
    bend, config = study.preset(preset)
    for note in chosen.fitted(study.model.n_layers).notes if chosen and is_first() else ():
        say(note)
    result = study.bend(
        replace(bend, **_given(alpha=alpha, beta=beta, gamma=gamma)),
        replace(config, **_given(steps=steps, save_every=save_every)),
    )
    return Path(str(result.model.adapter))


def run_defend(
    settings: Settings,
    *,
    defence: str,
    steps: int | None = None,
    learning_rate: float | None = None,
    save_every: int | None = None,
    mix: str | None = None,
    mix_files: Sequence[str] = (),
) -> Path:
    """``replib defend``: train one of the defences that RepBend is compared with, on the same rows or a paper's mix.

    Values are those of the comparison for the organism, else those that the method's source reports, single ones
    changed. Stopped or killed, the same command goes on. ``mix`` and ``mix_files`` (``name=path`` each) are those of
    ``paper_mix``.

    Raises:
        ReplibError: no defence or mix has that name.
    """
    study = Study.open(replace(settings, device=own_device(settings.device)))
    objective, config = baseline_for(study, defence)
    config = replace(config, **_given(steps=steps, learning_rate=learning_rate, save_every=save_every))
    files = {name: path for name, _, path in (part.partition("=") for part in mix_files)}
    result = defend(study, defence, Baseline(objective, config), mix=mix, files=files)
    return Path(str(result.model.adapter))


def run_harden(
    settings: Settings,
    *,
    inner: str = "repbend",
    steps: int | None = None,
    learning_rate: float | None = None,
    save_every: int | None = None,
) -> Path:
    """``replib harden``: train refusals that hold under edits fitted on the model in training (``replib.study.training``).

    Stopped or killed, the same command goes on.

    Raises:
        ReplibError: an inner objective of another name.
    """
    study = Study.open(replace(settings, device=own_device(settings.device)))
    chosen = _given(steps=steps, learning_rate=learning_rate, save_every=save_every)
    config = replace(schedule(study), **chosen)
    return Path(str(harden(study, inner_of(study, inner), config=config).model.adapter))


def _given(**options: Any) -> dict[str, Any]:
    """Options without those that were left out."""
    return {name: value for name, value in options.items() if value is not None}


def run_tune(settings: Settings, *, trials: int = 20, say: Callable[[str], object] = print) -> Path:
    """``replib tune``: search a tenth to ten times the preset's coefficients, as CSV; run again, it goes on.

    ``tune-MODEL.csv`` has a row a trial, ``best`` where no other trial dominates it. ``tune-MODEL-importances.csv`` has
    the share of each objective's variance that each coefficient explains.
    """
    study = Study.open(settings)
    objective = study_objective(study)
    storage = settings.out / f"tune-{Path(settings.model).name}.journal"
    ranges = ranges_around(objective.bend)
    found = tune(objective, trials=trials, storage=storage, seed=settings.seed, ranges=ranges)
    say(f"{len(found.table)} trials, {len(found.front)} on the front, {found.pruned} diverged; kept in {storage}")
    table = found.table.assign(best=found.table.index.isin(found.front.index))
    write_text(
        storage.with_name(f"{storage.stem}-importances.csv"), importances(found).to_csv(index_label="coefficient")
    )
    return write_text(storage.with_suffix(".csv"), table.to_csv(index=False))


def run_sweep(  # noqa: PLR0913
    settings: Settings,
    *,
    methods: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    ks: Sequence[int] | None = None,
    edit_at: Sequence[str | None] = (),
    fit_at: Sequence[Position | None] = (None,),
    strengths: Sequence[float] = (1.0,),
    best: int = 8,
    fits: int = 3,
    texts: str | None = None,
    say: Callable[[str], object] = print,
) -> Path:
    """``replib sweep``: edits at every block by their cheap score, answers of the best, and what these do besides.

    Four files: ``sweep-MODEL.csv`` has a row an edit; of the best edit of each method and edited position,
    ``fits-MODEL.csv`` has its success over fits on resampled prompts, ``pairs-MODEL.csv`` every two of them on the
    same prompts, and ``damage-MODEL.csv`` the metrics beside it. The best are chosen on the prompts that score them,
    which flatters the attacker.

    Args:
        settings: model, adapter, prompts by class, and where it all goes.
        methods: default PCA-OT at the last prompt token and at all positions, and the baselines.
        layers: blocks, default all.
        ks: numbers of principal components, default those of 1, 2, 4, 8, 16 that the prompts can fit.
        edit_at: edited positions, default those of each method's source.
        fit_at: positions whose activations fit the edits; None is the choice of each method's source.
        strengths: in [0, 1].
        best: edits of each method and edited position of which answers are generated.
        fits: on resampled prompts, 0 for none.
        texts: set or file of neutral text for perplexity.
        say: told the price before the work begins, and at the end what the cheap score is worth.
    """
    check_names(methods, edit_at, fit_at)  # before a large model is loaded
    study = Study.open(settings)
    sweeper = study.sweeper()
    asked = [(name, place) for name in methods or ["pca_ot"] for place in edit_at or [None]]
    more: dict[str, Any] = {"ks": ks or sweeper.ks, "strengths": strengths, "reads": fit_at}
    blocks = layers or range(study.model.n_layers)
    pairs = asked if methods or edit_at else SWEPT
    cells = [cell for name, place in pairs for cell in grid(name, blocks, positions=[place], **more)]
    say(f"{study.name}: {sweep_cost(sweeper, cells, best=best)}")
    report = SweepReport(sweeper, sweeper.table(cells, best=best))
    neutral = [p.text for p in load_prompts(texts)] if texts else []
    for name, table in report.tables(study.damage_meter(texts=neutral), fits).items():
        path = settings.out / f"{name}-{Path(settings.model).name}.csv"
        write_text(path, table.to_csv(index=False))
    say(report.worth())
    return settings.out / f"sweep-{Path(settings.model).name}.csv"


def run_capture(
    settings: Settings,
    *,
    prompts: str | None = None,
    name: str | None = None,
    stored_dtype: str = "float32",
    say: Callable[[str], object] = print,
    **options: Any,
) -> Path:
    """``replib capture``: activations of prompts in a folder, shard by shard; under torchrun each process makes some.

    Args:
        settings: model, adapter, prompts by class, batch size and where it all goes.
        prompts: a set or a file instead of the two classes; its own labels are kept.
        name: of the folder, default that of the model (and the adapter).
        stored_dtype: of the values on disk.
        say: told the price before the work begins.
        options: those of ``capture_to``.
    """
    for site in options.get("site", ()):
        check_site(site)
    if "positions" in options:  # before a large model is loaded
        check_positions([p] if isinstance(p := options["positions"], str | int) else p)
    with together() as part:
        records = _records(settings, prompts)
        texts, labels = [r.text for r in records], [r.label for r in records]
        model = load(settings.model, adapter=settings.adapter, device=own_device(settings.device), dtype=settings.dtype)
        given = {"labels": labels} if any(labels) else {}
        options |= given | {"dtype": getattr(torch, stored_dtype), "batch_size": settings.batch}
        folder = settings.out / "activations" / (name or _named(settings))
        if is_first():
            say(f"{capture_cost(model, texts, folder, **options)}: {folder}")
        capture_to(model, texts, folder, part=part, **options)
    if part[1] > 1 and is_first():
        finish_capture(model, texts, folder, **options)
    return folder


def _records(settings: Settings, source: str | None) -> list[Prompt]:
    """The prompts of a source, or of both classes, labelled by class."""
    choice: dict[str, Any] = {"limit": settings.limit or None, "seed": settings.seed}
    if source:
        return load_prompts(source, **choice)
    check_world(settings)
    harmful = load_prompts(settings.harmful, label="harmful", **choice)
    return harmful + load_prompts(settings.harmless, label="harmless", **choice)


def _named(settings: Settings) -> str:
    return "+".join(Path(folder).name for folder in (settings.model, settings.adapter) if folder)
