"""The command, its settings, and how it fails."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from cyclopts import App

import replib
from replib.cli import app as cli
from replib.cli import commands
from replib.core import settings
from replib.core.errors import ReplibError
from replib.core.settings import Settings, data_dir, setting

HEAVY = {
    "torch",
    "transformers",
    "peft",
    "sklearn",
    "scipy",
    "pandas",
    "plotly",
    "numpy",
    "nnsight",
    "nbclient",
}


def modules_after(statement):
    code = f"{statement}\nimport sys; print(*sys.modules, sep=',')"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split("\n")[-2].split(","))


@pytest.mark.parametrize(
    "statement",
    [
        "import replib",
        "import replib.core.settings, replib.core.errors",
        "import replib.cli\nreplib.cli.main(['--help'])",
        "import replib.cli\nreplib.cli.main(['sweep', '--nonsense'])",
    ],
)
def test_heavy_libraries_stay_out(statement):
    assert modules_after(statement) & HEAVY == set()


def test_submodules_load_on_first_use():
    assert "replib.core.settings" not in modules_after("import replib")
    assert "replib.core.settings" in modules_after("import replib; replib.core.settings.Settings")
    assert {"core", "cli", "load"} <= set(dir(replib))


def test_an_unknown_submodule_is_an_attribute_error():
    with pytest.raises(AttributeError, match="No replib attribute nonsense|no attribute 'nonsense'"):
        _ = replib.nonsense


@pytest.fixture
def verb(monkeypatch):
    """Runs in place of every command and records its settings and the options given."""
    parse, calls = App.parse_args, []
    verb = SimpleNamespace(calls=calls, run=lambda: Path("runs/result.json"))

    def parsed(self, *args, **options):
        command, bound, ignored = parse(self, *args, **options)
        if self is not cli.app:  # the launcher itself
            return command, bound, ignored
        return (lambda *_, settings, **__: calls.append((settings, bound.arguments)) or verb.run()), bound, ignored

    monkeypatch.setattr(App, "parse_args", parsed)
    return verb


@pytest.mark.parametrize("name", ["audit", "bend", "capture", "harden", "sweep", "tune"])
def test_verbs_receive_the_options_and_say_where_the_result_is(name, verb, capsys):
    options = "--model m --adapter a --harmful h.csv --harmless n.csv --out o --seed 3 --limit 9".split()
    assert cli.main([name, *options]) == 0
    expected = Settings(model="m", adapter="a", harmful="h.csv", harmless="n.csv", out=Path("o"), seed=3, limit=9)
    assert verb.calls == [(expected, {})]
    assert "wrote runs/result.json" in capsys.readouterr().out


def test_bend_passes_only_the_coefficients_that_were_given(verb):
    cli.main(["bend", "--preset", "llama3-8b", "--alpha", "0.2", "--steps", "7"])
    assert verb.calls[0][1] == {"preset": "llama3-8b", "alpha": 0.2, "steps": 7}


def test_defend_is_told_which_defence_and_what_was_changed(verb):
    cli.main(["defend", "npo_kl", "--steps", "7", "--learning-rate", "1e-4"])
    assert verb.calls[0][1] == {"defence": "npo_kl", "steps": 7, "learning_rate": 1e-4}


def test_harden_is_told_what_is_trained_beside_it(verb, capsys):
    cli.main(["harden", "--inner", "retention", "--steps", "7"])
    assert verb.calls[0][1] == {"inner": "retention", "steps": 7}
    assert cli.main(["harden", "--inner", "sft"]) == 2
    assert "repbend" in capsys.readouterr().err


def test_sweep_reads_methods_ranks_strengths_and_positions(verb):
    lists = "--methods pca_ot,rfa --layers -1,5 --ks 1,2 --edit-at last_prompt,all --fit-at -2,response".split()
    assert cli.main(["sweep", *lists, *"--strengths 0.5,1 --best 3 --fits 0 --texts t.txt".split()]) == 0
    assert verb.calls[0][1] == {
        "methods": ["pca_ot", "rfa"],
        "layers": [-1, 5],
        "ks": [1, 2],
        "edit_at": ["last_prompt", "all"],
        "fit_at": [-2, "response"],
        "strengths": [0.5, 1.0],
        "best": 3,
        "fits": 0,
        "texts": "t.txt",
    }


def test_capture_reads_lists_and_integers_a_minus_first_too(verb):
    lists = "--site resid_mid,mlp_out --layers -1,5 --positions -2".split()
    rest = "--max-new-tokens 3 --shard 7 --pool none --overflow truncate --stored-dtype bfloat16".split()
    assert cli.main(["capture", *lists, *rest]) == 0
    found = {"site": ["resid_mid", "mlp_out"], "layers": [-1, 5], "positions": -2, "pool": "none", "shard": 7}
    assert verb.calls[0][1] == found | {"max_new_tokens": 3, "overflow": "truncate", "stored_dtype": "bfloat16"}
    cli.main(["capture", "--positions", "last_prompt, -2"])
    assert verb.calls[1][1] == {"positions": ["last_prompt", -2]}


@pytest.mark.parametrize(
    "line, reason",
    [
        ("", "`replib --help` lists them"),
        ("beend", 'Did you mean "bend"'),
        ("bend --seed one", "--seed.*`replib --help`"),
        ("bend --alhpa 1", "--alhpa.*`replib bend --help`"),
        ("bend --alpha", "--alpha requires an argument"),
        ("bend extra", "extra"),
        ("defend --steps 2", "DEFENCE requires an argument"),
        ("run", "NOTEBOOKS requires an argument"),
    ],
)
def test_an_error_of_the_parser_is_one_line_with_option_and_repair_and_exit_2(line, reason, verb, capsys):
    assert cli.main(line.split()) == 2 and not verb.calls
    said = capsys.readouterr().err
    assert said.startswith("replib: ") and said.count("\n") == 1 and re.search(reason, said)


@pytest.mark.parametrize("line", ["--help", "--version", "sweep --help"])
def test_help_and_version_are_printed_whatever_the_variables_say(line, capsys, monkeypatch):
    monkeypatch.setenv("REPLIB_MODLE", "x")
    assert cli.main(line.split()) == 0
    assert "replib" in capsys.readouterr().out


def test_the_last_of_a_repeated_option_counts(verb):
    cli.main("capture --layers 1 --pool none --seed 1 --layers 2 --pool mean --seed 3".split())
    assert verb.calls[0][1] == {"layers": [2], "pool": "mean"} and verb.calls[0][0].seed == 3


def test_an_option_wins_over_its_variable(verb, monkeypatch):
    monkeypatch.setenv("REPLIB_MODEL", "planted")
    monkeypatch.setenv("REPLIB_SEED", "5")
    cli.main(["audit", "--model", "deep"])
    assert (verb.calls[0][0].model, verb.calls[0][0].seed) == ("deep", 5)


def test_zero_given_as_an_option_wins_over_a_variable(verb, monkeypatch):
    monkeypatch.setenv("REPLIB_SEED", "5")
    cli.main(["audit", "--seed", "0"])
    assert verb.calls[0][0].seed == 0


def test_an_error_of_ours_is_one_line_and_exit_2(verb, capsys):
    def fail():
        raise ReplibError("no tokenizer in x: add tokenizer.json.")

    verb.run = fail
    assert cli.main(["audit"]) == 2
    assert capsys.readouterr().err == "replib: no tokenizer in x: add tokenizer.json.\n"


def test_an_error_that_is_not_ours_is_not_hidden(verb):
    verb.run = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cli.main(["audit"])


def test_interrupt_exits_130_and_says_what_is_kept(verb, capsys):
    def interrupt():
        raise KeyboardInterrupt

    verb.run = interrupt
    assert cli.main(["sweep", "--out", "here"]) == 130
    assert "kept in here" in capsys.readouterr().err


def test_a_report_needs_executed_notebooks(tmp_path, capsys):
    assert cli.main(["report", "--out", str(tmp_path)]) == 2
    assert "replib demo" in capsys.readouterr().err


@pytest.fixture
def exported(monkeypatch):
    calls = []
    module = ModuleType("replib.figures.report")
    module.export_html = lambda paths, target, *, title: calls.append((list(paths), target, title))
    monkeypatch.setitem(sys.modules, "replib.figures.report", module)
    return calls


def test_report_exports_the_executed_notebooks_in_order(tmp_path, exported, capsys):
    (tmp_path / "notebooks").mkdir()
    copies = [tmp_path / "notebooks" / name for name in ("01_a.ipynb", "02_b.ipynb")]
    for copy in reversed(copies):
        copy.touch()
    assert cli.main(["report", "--out", str(tmp_path), "--model", "planted"]) == 0
    assert exported == [(copies, tmp_path / "report.html", "replib: planted")]
    assert str(tmp_path / "report.html") in capsys.readouterr().out


def test_demo_runs_the_notebooks_of_the_checkout_and_exports_what_they_gave(tmp_path, exported, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/02_b.ipynb").touch()
    (tmp_path / "notebooks/01_a.ipynb").touch()
    runner, seen = ModuleType("replib.cli.notebooks"), []
    runner.run_notebooks = lambda paths, out, env: seen.extend([*(p.name for p in paths), env]) or [out / "x.ipynb"]
    monkeypatch.setitem(sys.modules, "replib.cli.notebooks", runner)
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    assert cli.main(["demo", "--out", str(tmp_path / "o"), "--model", "deep"]) == 0
    assert seen[:2] == ["01_a.ipynb", "02_b.ipynb"]
    assert seen[2]["REPLIB_MODEL"] == "deep"
    assert exported[0][0] == [tmp_path / "o" / "x.ipynb"]


def test_run_gives_assignments_to_the_kernel_and_an_option_wins_over_them(monkeypatch, capsys):
    runner, seen = ModuleType("replib.cli.notebooks"), []
    runner.run_notebooks = lambda paths, out, env: seen.append((paths, env)) or [out / "notebooks/x.ipynb"]
    monkeypatch.setitem(sys.modules, "replib.cli.notebooks", runner)
    assignments = ["--set", "ALPHA=0.3", "--set", "replib_model=planted", "--set", "SEED=4"]
    assert cli.main(["run", "x.ipynb", "--seed", "5", *assignments]) == 0
    paths, env = seen[0]
    assert paths == [Path("x.ipynb")]
    assert [env[f"REPLIB_{name}"] for name in ("ALPHA", "MODEL", "SEED")] == ["0.3", "planted", "5"]
    assert "notebooks/x.ipynb" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, reason", [("MODEL", "NAME=VALUE"), ("=x", "NAME=VALUE"), ("MODLE=x", "did you mean REPLIB_MODEL")]
)
def test_a_bad_assignment_is_refused(text, reason, capsys):
    assert cli.main(["run", "x.ipynb", "--set", text]) == 2
    assert reason in capsys.readouterr().err


def test_settings_survive_the_environment():
    everything = Settings("m", "a", "h", "n", Path("/o"), 1, 2, 3, "cpu", "float32", True)
    assert all(a != b for a, b in zip(vars(everything).values(), vars(Settings()).values(), strict=True))
    assert Settings.from_env(everything.environ()) == everything
    assert Settings.from_env(Settings().environ()) == Settings()


def test_a_relative_output_folder_keeps_its_place_when_the_kernel_starts_elsewhere():
    assert replace(Settings(), out=Path("o")).environ()["REPLIB_OUT"] == str(Path.cwd() / "o")


def test_an_empty_variable_is_an_unset_one():
    assert Settings.from_env({"REPLIB_MODEL": "", "REPLIB_SEED": ""}) == Settings()


@pytest.mark.parametrize(
    "name, value, repair",
    [
        ("REPLIB_MODLE", "x", "did you mean REPLIB_MODEL"),
        ("REPLIB_ZZZZ", "x", "Known are REPLIB_MODEL"),
        ("REPLIB_SEED", "one", "whole number.*REPLIB_SEED=0"),
        ("REPLIB_SEED", "-1", "0 or more"),
        ("REPLIB_BATCH", "0", "1 or more"),
        ("REPLIB_LIMIT", "-3", "0 or more"),
        ("REPLIB_KEEP_TEXT", "perhaps", "switch.*REPLIB_KEEP_TEXT=0"),
    ],
)
def test_a_bad_variable_is_refused_with_its_repair(name, value, repair, monkeypatch):
    with pytest.raises(ReplibError, match=repair):
        Settings.from_env({name: value})
    monkeypatch.setenv(name, value)
    assert cli.main(["report"]) == 2


def test_foreign_variables_are_left_alone():
    assert Settings.from_env({"HOME": "/x", "MODEL": "y", "MY_REPLIB_MODEL": "z"}) == Settings()


@pytest.mark.parametrize(
    "name, text, default, value",
    [
        ("STEPS", "12", 90, 12),
        ("ALPHA", "0.25", 0.5, 0.25),
        ("KEEP_TEXT", "on", False, True),
        ("KEEP_TEXT", "0", True, False),
        ("OUT", "x/y", Path("runs"), Path("x/y")),
        ("MODEL", "", "aligned", "aligned"),
    ],
)
def test_a_notebook_setting_has_the_type_of_its_default(name, text, default, value, monkeypatch):
    monkeypatch.setenv(f"REPLIB_{name}", text)
    assert setting(name, default) == value
    assert type(setting(name, default)) is type(value)


def test_a_notebook_setting_that_no_variable_could_set_is_refused():
    with pytest.raises(ReplibError, match="REPLIB_ALPHAS.*did you mean REPLIB_ALPHA"):
        setting("ALPHAS", 1.0)


def test_a_notebook_notices_a_misspelt_variable_beside_the_one_it_reads(monkeypatch):
    monkeypatch.setenv("REPLIB_MODLE", "x")
    with pytest.raises(ReplibError, match="did you mean REPLIB_MODEL"):
        setting("SEED", 0)


def test_data_lies_in_the_checkout_or_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    with pytest.raises(ReplibError, match="set REPLIB_DATA"):
        data_dir()
    (tmp_path / "data").mkdir()
    assert data_dir() == tmp_path / "data"
    monkeypatch.setenv("REPLIB_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.setenv("REPLIB_DATA", str(tmp_path / "gone"))
    with pytest.raises(ReplibError, match="gone is not a folder"):
        data_dir()
