"""The commands: each opens a study, runs one analysis and returns the path of its result.

Signatures and docstrings are the command line's options and help. What an analysis needs is imported when it runs, so
that ``replib --help`` loads no numerical library.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from replib.cli import options
from replib.cli.options import Given
from replib.core.errors import ReplibError
from replib.core.settings import ROOT, Settings


def run_demo(*, settings: Given) -> None:
    """Run every notebook and write one offline HTML report.

    Args:
        settings: model, prompts and output folder.

    Raises:
        ReplibError: replib is not run from a checkout.
    """
    from replib.cli.notebooks import run_notebooks

    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if not paths:
        raise ReplibError(f"{ROOT} holds no notebooks/*.ipynb: run the demo from a checkout of replib.")
    cost = "about 8 minutes on 2 cores, less where work is kept"
    print(f"Running {len(paths)} notebooks on {settings.model}: {cost}.", flush=True)
    _export(run_notebooks(paths, settings.out, env=settings.environ()), settings)


def run_chosen(
    notebooks: list[Path],
    /,
    *,
    settings: Given,
    assignments: Annotated[list[tuple[str, str]] | None, options.ASSIGNMENTS] = None,
) -> None:
    """Run chosen notebooks.

    Args:
        notebooks: paths of notebooks, in order.
        settings: model, prompts and output folder.
        assignments: any setting, as REPLIB_NAME=VALUE would give it; may be repeated.
    """
    from replib.cli.notebooks import run_notebooks

    for path in run_notebooks(notebooks, settings.out, env=dict(assignments or ()) | settings.environ()):
        print(f"wrote {path}")


def run_report(*, settings: Given) -> None:
    """Write the HTML report of notebooks already run.

    Args:
        settings: output folder, and the model of the title.

    Raises:
        ReplibError: no notebook was run.
    """
    executed = sorted((settings.out / "notebooks").glob("*.ipynb"))
    if not executed:
        raise ReplibError(f"{settings.out / 'notebooks'} holds no executed notebook: run `replib demo` first.")
    _export(executed, settings)


def _export(executed: list[Path], settings: Settings) -> None:
    from replib.figures.report import export_html

    report = settings.out / "report.html"
    export_html(executed, report, title=f"replib: {settings.model}")
    print(f"Report, to open in any browser without a network: {report.absolute()}")


def run_audit(*, settings: Given) -> Path:
    """Attack a model and judge its answers, as one table.

    Args:
        settings: model, prompts and output folder.
    """
    from replib.study.study import Study

    return Study.open(settings).audit().save(settings.out / f"audit-{Path(settings.model).name}.csv")


def run_bend(  # noqa: PLR0913
    *,
    settings: Given,
    preset: str | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    steps: int | None = None,
    save_every: Annotated[int | None, options.whole_number(0)] = None,
) -> Path:
    """Train a RepBend adapter.

    Stopped or killed, the same command goes on from the last checkpoint. Under torchrun or accelerate launch (files in
    replib/training/configs) processes train together, each on micro-batches of its own.

    Args:
        settings: model, prompts and output folder.
        preset: organism, short, llama3-8b, mistral-7b, gemma2-2b or qwen2.5-14b; default by model.
        alpha: weight of pushing unsafe representations away (the paper's meaning).
        beta: weight of aligning unsafe representations with each other.
        gamma: weight of staying close on benign text (KL).
        steps: training steps.
        save_every: steps between checkpoints; default 25, 0 for none.

    Raises:
        ReplibError: no preset has that name.
    """
    from replib.core.distributed import is_first
    from replib.defences.repbend.presets import preset_named

    chosen = preset_named(preset) if preset else None  # before a large model is loaded
    study = _study(settings)
    bend, config = study.preset(preset)
    for note in chosen.fitted(study.model.n_layers).notes if chosen and is_first() else ():
        print(note)
    result = study.bend(
        replace(bend, **_given(alpha=alpha, beta=beta, gamma=gamma)),
        replace(config, **_given(steps=steps, save_every=save_every)),
    )
    return Path(str(result.model.adapter))


def run_defend(
    defence: str,
    /,
    *,
    settings: Given,
    steps: int | None = None,
    learning_rate: float | None = None,
    save_every: Annotated[int | None, options.whole_number(0)] = None,
    mix: Annotated[Literal["repbend", "circuit_breaker"] | None, options.WORD] = None,
    mix_files: Annotated[list[str] | None, options.FILES] = None,
) -> Path:
    """Train a defence that RepBend is compared with, on the same rows or on a paper's mix.

    Values are those of the comparison for the organism, else those of the method's source. Stopped or killed, the same
    command goes on.

    Args:
        defence: sft, dpo, npo, npo_rt, npo_kl, rmu, circuit_breaker, whp or task_arithmetic; on other models than the
            organism whp_retain too.
        settings: model, prompts and output folder.
        steps: training steps.
        learning_rate: highest learning rate (of the first step, or after the warm-up); default by defence and model.
        save_every: steps between checkpoints; default 25, 0 for none.
        mix: training mix of a paper; default the rows that replib bend trains on.
        mix_files: files of that mix by name (the organism needs none).

    Raises:
        ReplibError: no defence has that name, or no file of the mix.
    """
    from replib.defences.catalogue import Baseline
    from replib.study.training import baseline_for, defend

    study = _study(settings)
    objective, config = baseline_for(study, defence)
    config = replace(config, **_given(steps=steps, learning_rate=learning_rate, save_every=save_every))
    files = {name: path for name, _, path in (part.partition("=") for part in mix_files or ())}
    result = defend(study, defence, Baseline(objective, config), mix=mix, files=files)
    return Path(str(result.model.adapter))


def run_harden(
    *,
    settings: Given,
    inner: Annotated[Literal["repbend", "retention"], options.WORD] = "repbend",
    steps: int | None = None,
    learning_rate: float | None = None,
    save_every: Annotated[int | None, options.whole_number(0)] = None,
) -> Path:
    """Train refusals that hold while edits act on the model.

    The edits are fitted on the model in training. Stopped or killed, the same command goes on.

    Args:
        settings: model, prompts and output folder.
        inner: objective trained beside hardening; retention holds the model in place.
        steps: training steps.
        learning_rate: highest learning rate (of the first step, or after the warm-up); default by model.
        save_every: steps between checkpoints; default 25, 0 for none.
    """
    from replib.study.training import harden, inner_of, schedule

    study = _study(settings)
    chosen = _given(steps=steps, learning_rate=learning_rate, save_every=save_every)
    config = replace(schedule(study), **chosen)
    return Path(str(harden(study, inner_of(study, inner), config=config).model.adapter))


def run_tune(*, settings: Given, trials: Annotated[int, options.whole_number(1)] = 20) -> Path:
    """Search alpha, beta and gamma, one training per trial; run again, it goes on.

    The range is a tenth to ten times the preset's coefficients. tune-MODEL.csv has a row a trial, with best true where
    no other trial dominates it; tune-MODEL-importances.csv has the share of each objective's variance that each
    coefficient explains.

    Args:
        settings: model, prompts and output folder.
        trials: trainings that the search holds in the end; finished ones are kept.
    """
    from replib.core.storage import write_text
    from replib.defences.tuning import importances, ranges_around, tune
    from replib.study.study import Study
    from replib.study.training import study_objective

    objective = study_objective(Study.open(settings))
    storage = settings.out / f"tune-{Path(settings.model).name}.journal"
    search = tune(objective, trials=trials, storage=storage, seed=settings.seed, ranges=ranges_around(objective.bend))
    table, front = search.table, search.front
    print(f"{len(table)} trials, {len(front)} on the front, {search.pruned} diverged; kept in {storage}")
    table = table.assign(best=table.index.isin(front.index))
    shares = importances(search).to_csv(index_label="coefficient")
    write_text(storage.with_name(f"{storage.stem}-importances.csv"), shares)
    return write_text(storage.with_suffix(".csv"), table.to_csv(index=False))


def run_sweep(  # noqa: PLR0913
    *,
    settings: Given,
    methods: Annotated[list[str] | None, options.METHOD_NAMES] = None,
    layers: Annotated[list[int] | None, options.LAYERS] = None,
    ks: Annotated[list[int] | None, options.RANKS] = None,
    edit_at: Annotated[list[str] | None, options.EDIT_AT] = None,
    fit_at: Annotated[list[str | int] | None, options.FIT_AT] = None,
    strengths: Annotated[list[float] | None, options.STRENGTH_LIST] = None,
    best: Annotated[int, options.whole_number(1)] = 8,
    fits: Annotated[int, options.whole_number(0)] = 3,
    texts: str | None = None,
) -> Path:
    """Ablate refusal layer by layer, against the baselines.

    Every edit is scored cheaply, the best are answered. Four files: sweep-MODEL.csv has a row an edit; of the best edit
    of each method and edited position, fits-MODEL.csv has the success over fits on resampled prompts, pairs-MODEL.csv
    the paired tests on the same prompts, and damage-MODEL.csv the metrics beside it. The best are chosen on the prompts
    that score them, which flatters the attacker.

    Args:
        settings: model, prompts and output folder.
        methods: edits to fit; default PCA-OT at the last prompt token and at all positions, and the baselines.
        layers: block indices, negative ones from the end; default all.
        ks: numbers of principal components; default those of 1,2,4,8,16 that the prompts can fit.
        edit_at: edited tokens (last_prompt, all_prompt, response, decode, all); default as in each method's source.
        fit_at: positions whose activations fit the edits; default as in each method's source.
        strengths: shares of each edit, from 0 to 1; default 1.
        best: edits of each method and edited position whose answers are written, best by cheap score.
        fits: fits of each method's best edit on resampled prompts, 0 for none.
        texts: set or file of neutral text for perplexity.
    """
    from replib.ablation.fit import check_cell_names, grid
    from replib.ablation.sweep_cost import sweep_cost
    from replib.ablation.sweep_report import SweepReport
    from replib.core.storage import write_text
    from replib.data.prompts import load_prompts
    from replib.study.study import BASELINES, Study

    check_cell_names(methods or (), edit_at or (), fit_at or ())  # before a large model is loaded
    study = Study.open(settings)
    sweeper = study.sweeper()
    places: list[Any] = [*edit_at] if edit_at else [None]
    pairs = [(name, place) for name in methods or ["pca_ot"] for place in places]
    if not (methods or edit_at):
        pairs = [("pca_ot", "last_prompt"), ("pca_ot", "all"), *BASELINES]
    axes: dict[str, Any] = {"ks": ks or sweeper.ks, "strengths": strengths or (1.0,), "reads": fit_at or (None,)}
    blocks = layers or range(study.model.n_layers)
    cells = [cell for name, place in pairs for cell in grid(name, blocks, positions=[place], **axes)]
    print(f"{study.name}: {sweep_cost(sweeper, cells, best=best)}", flush=True)
    report = SweepReport(sweeper, sweeper.table(cells, best=best))
    neutral = [p.text for p in load_prompts(texts)] if texts else []
    for name, table in report.tables(study.damage_meter(texts=neutral), fits).items():
        path = settings.out / f"{name}-{Path(settings.model).name}.csv"
        write_text(path, table.to_csv(index=False))
    print(report.worth())
    return settings.out / f"sweep-{Path(settings.model).name}.csv"


def _study(settings: Settings) -> Any:
    """Study on the device of this process; under torchrun each has its own."""
    from replib.core.distributed import own_device
    from replib.study.study import Study

    return Study.open(replace(settings, device=own_device(settings.device)))


def _given(**values: Any) -> dict[str, Any]:
    """Values without those left out."""
    return {name: value for name, value in values.items() if value is not None}
