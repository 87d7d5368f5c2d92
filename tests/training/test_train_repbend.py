"""RepBend's training: its start, schedules, safeguards, accumulation and presets."""

import warnings
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from helpers import tiny
from helpers.parts import bend_terms, items_of
from helpers.tolerance import GRADIENT, close
from replib.cli.commands import run_bend
from replib.core.errors import ReplibError
from replib.core.settings import Settings
from replib.data.mixtures import BendData
from replib.data.prompts import Contrast, Dialogue
from replib.defences.losses import distance
from replib.defences.repbend.config import FIDELITIES, OFFICIAL, BendConfig, Scope, announced
from replib.defences.repbend.loss import bend_loss, remembered, weights
from replib.defences.repbend.objective import RepBend
from replib.defences.repbend.presets import ORGANISM_BEND, PRESETS, PUBLISHED_BEND, preset_named
from replib.models.load import load
from replib.study.study import Study
from replib.training.config import TrainConfig
from replib.training.train import attach, train
from replib.training.trainer import DefenceTrainer, Steps, arguments

CONTRASTS = [Contrast(f"w{i} w{i + 1}", "w30 w31", "w32 w33 w34") for i in range(3)]
DATA = BendData(CONTRASTS, [Dialogue(f"w{i} w9", f"w{i} w8") for i in range(3)])
SMALL = TrainConfig(steps=2, contrasts=3, retain=3, rank=2, lora_alpha=2, dropout=0.0, learning_rate=1e-2)
QUIET = {"say": lambda text: None}


@pytest.fixture
def model(tmp_path):
    return load(tiny.save_model(tmp_path / "llama"))


def slopes(chat, config):
    """Size of each term's gradient, and of that of the loss."""
    terms = bend_terms(chat, items_of(CONTRASTS, DATA.retain), replace(config, target_layers=(1, 2)))
    lora = [p for n, p in chat.model.named_parameters() if "lora_" in n]
    scalars = terms.taken() | {"loss": bend_loss(terms, config)}
    grads = {n: torch.autograd.grad(x, lora, retain_graph=True) for n, x in scalars.items()}
    return {n: sum(g.norm().item() for g in found) for n, found in grads.items()}


# ------------------------------------------------------------------------------------------- the start
def test_without_cosine_and_pairing_the_start_has_no_gradient_and_is_warned_of(model, tmp_path):
    with pytest.warns(UserWarning, match="beta and eta are 0: .* rounding noise"):
        train(model, DATA, RepBend(BendConfig(beta=0.0)), config=SMALL, out=tmp_path, **QUIET)
    chat = attach(load(tiny.save_model(tmp_path / "again")), SMALL)
    assert slopes(chat.model.eval() and chat, BendConfig(beta=0.0))["loss"] < 1e-4
    found = slopes(chat, BendConfig(beta=0.0, eta=0.2))
    assert found["pairing"] > 1e-2 and found["loss"] > 1e-3 and BendConfig(beta=0.0, eta=0.2).escapes


def test_a_perturbed_start_gives_every_term_a_gradient_and_is_the_same_every_time(tmp_path):
    folder = tiny.save_model(tmp_path / "llama")
    moved = TrainConfig(**(vars(SMALL) | {"perturbation": 1e-2}))
    chats = [attach(load(folder), moved) for _ in range(2)]
    assert min(slopes(chats[0].model.eval() and chats[0], BendConfig(eta=0.1)).values()) > 1e-3
    for a, b in zip(*(dict(c.model.named_parameters()).items() for c in chats), strict=True):
        assert torch.equal(a[1], b[1]), a[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(load(folder), DATA, RepBend(BendConfig(beta=0.0)), config=moved, out=tmp_path, **QUIET)


# ------------------------------------------------------------------------------------------- schedules, safeguards
def test_ramps_are_those_of_circuit_breakers():
    """p = step / (2 steps): what keeps counts p-fold, what changes (1 - p)-fold."""
    config = BendConfig(alpha=0.4, beta=0.2, gamma=0.3, eta=0.1, schedule="ramps")
    for step in (0, 75, 150):
        p = step / 300
        expected = (0.5 * p, 0.4 * (1 - p), 0.2 * (1 - p), 0.3 * p, 0.1 * (1 - p))
        assert weights(config, step / 150) == pytest.approx(expected)
    assert weights(BendConfig(), 0.7) == (0.5, 0.5, 0.1, 0.3, 0.0)


def test_a_relative_distance_does_not_depend_on_the_scale():
    bent, base = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    literal = ((bent - base).norm(dim=-1) / base.norm(dim=-1)).mean()
    assert distance(bent, base, relative=True).item() == pytest.approx(literal.item(), rel=1e-6)
    assert distance(9 * bent, 9 * base, relative=True).item() == pytest.approx(literal.item(), rel=1e-5)
    assert distance(40 * base, base, relative=True, max_distance=2.0).item() == pytest.approx(2.0)


def test_the_queue_holds_the_newest_rows_without_gradients():
    rows = [torch.full((2, 3, 4), float(i), requires_grad=True) for i in range(3)]
    queue = None
    for new in rows:
        queue = remembered(queue, new, 5)
    assert queue[0, :, 0].tolist() == [1, 1, 2, 2, 2] and not queue.requires_grad
    assert remembered(queue, rows[0], 0) is None


def test_training_ends_where_probes_stop_getting_better(model, tmp_path):
    left = iter([0.9, 0.1, 0.5, 0.5, 0.0, 0.0])
    config = TrainConfig(**(vars(SMALL) | {"steps": 5, "probe_every": 1, "patience": 2}))
    result = train(
        model, DATA, RepBend(), config=config, out=tmp_path, validation=lambda _: {"attack": next(left)}, **QUIET
    )
    assert result.step == 1 and result.probes["step"].tolist() == [0, 1, 2, 3] and len(result.history) == 3


def test_what_is_in_force_is_said_before_the_first_step():
    config = TrainConfig(max_grad_norm=0.0)
    assert announced(BendConfig(), config, 4) == (
        "RepBend (replib fidelity) bends blocks 2, 3 of 4 (by relative depth, 60 to 95%). Safeguards: none."
    )
    guarded = announced(BendConfig(target_layers=(1,), max_distance=0.8, relative=True), TrainConfig(patience=3), 4)
    assert "blocks 1 of 4 (as given)" in guarded
    assert guarded.endswith("Safeguards: max_distance 0.8, relative, max_grad_norm 1, patience 3.")


@pytest.mark.parametrize(
    "wrong",
    [{"fidelity": "exact"}, {"loss_mode": "all"}, {"alpha_mode": "none"}, {"site": "mlp_out"}, {"schedule": "linear"}],
)
def test_unknown_choices_are_named_with_the_known_ones(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ReplibError, match=f"{name}='{value}' is unknown: use one of "):
        BendConfig(**wrong)


def test_a_scope_refuses_what_it_does_not_know():
    with pytest.raises(ReplibError, match="kl_rows='every' is unknown"):
        Scope(kl_rows="every")
    with pytest.raises(ReplibError, match="queue=-1"):
        Scope(queue=-1)
    with pytest.raises(ReplibError, match="anchored .* gathered='unsafe'"):
        BendConfig(anchored=True, fidelity="paper")


# ------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_every_fidelity_trains_and_adapts_its_blocks(fidelity, kind, tmp_path):
    bend = BendConfig(fidelity=fidelity, target_layers=(0,), eta=0.1)
    result = train(load(tiny.save_model(tmp_path, kind)), DATA, RepBend(bend), config=SMALL, out=tmp_path, **QUIET)
    assert result.history["unsafe"].iloc[-1] > 0 and result.history["pairing"].notna().all()
    adapted = {i for i, b in enumerate(result.model.blocks) if any("lora_" in n for n, _ in b.named_parameters())}
    assert adapted == ({0, 1} if fidelity == "official" else {0, 1, 2})
    assert result.config["objective"]["scope"]["kl_rows"] == FIDELITIES[fidelity].kl_rows


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, *_, model=None, **__):
        self.found = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_" in n])


def test_the_gradient_of_equal_micro_batches_is_that_of_one(tmp_path):
    """Micro-batches hold all of the data in another order each, so their mean is any one of them."""
    folder, found = tiny.save_model(tmp_path / "llama"), []
    for accumulation in (1, 3):
        config = TrainConfig(**(vars(SMALL) | {"steps": 1, "accumulation": accumulation, "max_grad_norm": 0.0}))
        chat, grads = attach(load(folder), config), Gradients()
        objective = RepBend(BendConfig(target_layers=(1, 2)))
        trainer = DefenceTrainer(
            args=arguments(config, tmp_path), train_dataset=Steps(vars(DATA), objective.draws(config), config),
            callbacks=[grads], chat=chat, objective=objective, config=config,
        )  # fmt: skip
        trainer.train()
        assert [row["step"] for row in trainer.history] == [1] * accumulation
        found.append(grads.found)
    close(found[1], found[0], depth=GRADIENT)
    assert found[0].norm() > 1e-3


@pytest.mark.slow
def test_the_organism_is_bent_as_it_was_before_there_were_fidelities(tmp_path):
    """The first three steps of the run whose outcome the suite reports, as they were logged then.

    The first is rounding apart. Adam steps as far where a gradient is rounding as where it is large, so that kernels
    part from the second on: by up to 7 % of the KL and 1 % of the rest.
    """
    study = Study.open(Settings(out=tmp_path))
    bend, config = study.preset()
    config = replace(config, steps=3)
    history = train(study.model, study.bend_data, RepBend(bend), config=config, out=tmp_path, **QUIET).history
    then = {
        "loss": [1.85322, 1.56398, 0.508408],
        "safe": [0.0, 0.647827, 0.904746],
        "unsafe": [0.0, 0.993844, 1.372719],
        "cosine": [-0.061774, -0.043589, -0.003279],
        "kl": [0.0, 0.000119087, 0.000674849],
    }
    for name, (first, *later) in then.items():
        assert history[name][0] == pytest.approx(first, rel=1e-5, abs=1e-5), name
        slack = {"rel": 0.15, "abs": 0.0} if name == "kl" else {"rel": 0.03, "abs": 2e-4}
        assert history[name][1:].tolist() == pytest.approx(later, **slack), name


# ------------------------------------------------------------------------------------------- presets
def test_published_values_are_those_of_the_paper_and_the_rest_is_none():
    steps = {name: (PRESETS[name].published["steps"], PRESETS[name].published["learning_rate"]) for name in PRESETS}
    assert steps["llama3-8b"] == (450, 1e-5) and steps["mistral-7b"] == (300, 1e-5)
    assert steps["gemma2-2b"] == steps["qwen2.5-14b"] == (None, None)
    for name in ("llama3-8b", "mistral-7b", "gemma2-2b", "qwen2.5-14b"):
        preset, facts = PRESETS[name], PRESETS[name].published
        assert (facts["alpha"], facts["beta"], facts["gamma"]) == (0.5, 0.1, 0.3)
        lora = (preset.train.rank, preset.train.lora_alpha, preset.train.dropout, preset.train.schedule)
        assert lora == (16, 16, 0.05, "constant") and preset.bend.scope is OFFICIAL


def test_a_preset_fits_other_depths_and_says_what_is_not_published():
    assert preset_named("llama3-8b").fitted(32) == (PUBLISHED_BEND, PRESETS["llama3-8b"].train, [])
    assert preset_named("llama3-8b").bend.layers(32) == tuple(range(19, 30))  # hidden states 20 to 30
    bend, _, (note,) = preset_named("mistral-7b").fitted(16)
    assert bend.layers(16) == tuple(range(10, 15)) and "published for 32 blocks, this model has 16" in note
    bend, config, notes = preset_named("gemma2-2b").fitted(26)
    assert bend.layers(26) == tuple(range(16, 25)) and config.steps == 450
    assert notes == [
        "steps is not published: 450, that of Llama-3, unless another is given.",
        "learning_rate is not published: 1e-05, that of Llama-3, unless another is given.",
        "The target blocks are not published: 16 to 24 of 26, by relative depth.",
    ]
    with pytest.raises(ReplibError, match="no preset 'llama': use one of organism"):
        preset_named("llama")


def test_the_presets_of_this_suite_are_what_its_results_were_made_with():
    bend, config, notes = preset_named("organism").fitted(12)
    assert bend is ORGANISM_BEND and not notes and bend.layers(12) == (7, 8, 9, 10, 11)
    assert (bend.alpha, bend.beta, bend.gamma, bend.temperature, bend.max_distance) == (0.08, 30.0, 100.0, 1.0, 0.8)
    assert (config.steps, config.contrasts, config.retain, config.learning_rate) == (40, 8, 40, 1e-3)
    bend, config, _ = preset_named("short").fitted(32)
    assert bend == BendConfig() and (config.steps, config.contrasts, config.learning_rate) == (30, 4, 1e-4)


def test_the_command_line_names_every_preset():
    assert all(name in (run_bend.__doc__ or "") for name in PRESETS)
