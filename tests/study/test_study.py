"""The verbs of the suite on models and prompts that were not made here, and on the organism."""

import shutil
import warnings

import pandas as pd
import pytest
import torch

from helpers import tiny
from replib import figures
from replib.analysis.logit_lens import compare, logit_lens
from replib.analysis.profile import layer_profile
from replib.audit.judges import ExactJudge, PhraseJudge
from replib.cli.commands import run_audit, run_bend, run_sweep
from replib.core.errors import ReplibError
from replib.core.settings import Settings
from replib.models.self_check import token_table
from replib.study.study import Study
from replib.training.config import TrainConfig

FEW = TrainConfig(steps=2, contrasts=2, retain=2, rank=2, probe_every=2)
MODELS = {"qwen2": "hf-qwen2.5", "llama": "hf-mistral-v3"}


@pytest.fixture(scope="module", params=[*MODELS, "stories"])
def foreign(request, shared_data, tmp_path_factory):
    """Settings of a model that is not the organism: real tokenizer and template, or a real checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "stories":
        shutil.copytree(shared_data / "models" / "llama2c-stories260K", folder, dirs_exist_ok=True)
    else:
        tiny.save_around(shared_data / "tokenizers" / MODELS[request.param], request.param, folder)
    return Settings(
        model=str(folder),
        harmful=str(shared_data / "advbench" / "harmful_behaviors.csv"),
        harmless=str(shared_data / "refusal_direction" / "splits" / "harmless_val.json"),
        out=folder / "runs",
        limit=10,
    )


def opened(settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no chat template")
        return Study.open(settings)


def test_every_verb_runs_on_a_foreign_model_and_real_files(foreign):
    study = opened(foreign)
    assert isinstance(study.judge, PhraseJudge) and not study.organism
    texts = [{p.text for p in split} for split in study.harmful]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    harmful, harmless = study.pair()
    profile = layer_profile(harmful.values, harmless.values, permutations=20)
    assert profile["js"].shape == (study.model.n_layers,)
    (
        figures.distances(profile),
        figures.divergence({"both": profile}),
        figures.transport_gap(profile),
        figures.clusters((harmful, harmless), 0),
    )
    assert figures.lens_heatmap(logit_lens(study.model, study.harmful.val[0].text)).data
    assert len(token_table(study.model, study.harmful.val[0].text).columns) > 3
    table = study.audit(study.tasks(limit=2)[:3]).frame
    assert (table.n == 2).all() and (study.settings.out / "audit.jsonl").exists()
    sweep = study.sweeper(limit=2).layers(ks=(1,), layers=[0, -1])
    assert sweep.compliance.notna().all()
    result = study.bend(config=FEW)
    bent = study.with_model(result.model)
    assert bent.moved()["unsafe"].shape == (study.model.n_layers,) and bent.name.endswith("+ RepBend")
    target = study.harmful.test[0]
    assert compare(bent.model, target.text, study.forced(target)).js.isfinite().all()


def test_an_adapter_that_was_trained_is_read_and_not_trained_again(tmp_path, monkeypatch):
    settings = Settings(out=tmp_path, limit=4)
    first = Study.open(settings).bend(config=FEW)
    monkeypatch.setattr("replib.study.study.train", lambda *_a, **_k: pytest.fail("trained again"))
    again = Study.open(settings).bend(config=FEW)
    assert again.step == first.step
    batch = first.model.encode(["Repeat: sun moon"])
    with torch.no_grad():
        torch.testing.assert_close(again.model.forward(batch), first.model.forward(batch))


def test_foreign_models_need_their_own_prompts(tmp_path):
    with pytest.raises(ReplibError, match="does not know: set REPLIB_HARMFUL"):
        Study.open(Settings(model=str(tiny.save_model(tmp_path))))


def test_the_organism_is_judged_exactly_on_disjoint_splits():
    study = Study.open(Settings())
    assert isinstance(study.judge, ExactJudge)
    for prompts in (study.harmful, study.harmless):
        groups = [{p.group for p in split} for split in prompts]
        assert not groups[0] & groups[1] and not groups[1] & groups[2] and not groups[0] & groups[2]
    kinds = {t.kind for t in study.tasks()}
    assert kinds == {"direct", "attack", "seen", "prefill", "benign", "skill"}
    trained = {c.group for c in study.bend_data.contrasts}
    assert not trained & {p.group for t in study.tasks() + study.tasks("val") for p in t.prompts if p.group}


def test_a_limit_samples_and_the_seed_decides_which():
    names = lambda seed: [p.text for p in Study.open(Settings(limit=5, seed=seed)).harmful.test]  # noqa: E731
    assert len(names(0)) == 5 and names(0) == names(0) != names(1)


def test_the_command_line_verbs_write_what_they_say(tmp_path):
    settings = Settings(out=tmp_path, limit=2)
    for path in (run_audit(settings=settings), run_bend(settings=settings, alpha=0.1, steps=2)):
        assert path.exists() and tmp_path in path.parents


def test_a_sweep_says_its_price_and_leaves_fits_pairs_and_damage(tmp_path, capsys):
    options = {"methods": ["pca_ot", "ace"], "layers": [5, 9], "ks": [1], "best": 1, "fits": 2}
    path = run_sweep(settings=Settings(out=tmp_path, limit=3), **options)
    price, *_, worth = [line for line in capsys.readouterr().out.splitlines() if line]
    tables = {p.stem.split("-")[0]: pd.read_csv(p) for p in tmp_path.glob("*.csv")}
    assert path.name == "sweep-aligned.csv" and set(tables) == {"sweep", "fits", "pairs", "damage"}
    assert len(tables["sweep"]) == 4 and tables["sweep"].compliance.notna().sum() == 2
    assert tables["fits"].fits.eq(2).all() and len(tables["fits"]) == 2 and len(tables["pairs"]) == 1
    assert set(tables["damage"].method) == {"pca_ot", "ace"}
    assert "4 edits, 4 of them to be scored" in price and "2 edits have both" in worth
    with pytest.raises(ReplibError, match="Unknown method 'x'"):
        run_sweep(settings=Settings(out=tmp_path), methods=["x"])


def test_missing_prompt_files_and_columns_are_named(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ReplibError):
        Study.open(Settings(harmful=str(tmp_path / "none.csv"), harmless=str(file)))
    with pytest.raises(ReplibError):
        Study.open(Settings(harmful=str(file), harmless=str(file)))
