"""Notebooks run in order, only where something changed, and stop with what was done kept."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from replib.cli import notebooks as run
from replib.cli.notebooks import run_notebooks
from replib.core.errors import ReplibError

WRITE = "import os, pathlib\nout = pathlib.Path(os.environ['REPLIB_OUT'])\n(out / 'a.txt').write_text('from one')"
READ = "import os, pathlib\nprint((pathlib.Path(os.environ['REPLIB_OUT']) / 'a.txt').read_text())"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "src").mkdir()
    return tmp_path


def write(folder, name, *cells):
    path = folder / "src" / name
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Title"), *map(new_code_cell, cells)]), path)
    return path


def printed(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.text for cell in cells for o in cell.get("outputs", []) if o.output_type == "stream")


def executions(monkeypatch):
    """Names of the notebooks that are really executed from now on; nothing is."""
    names = []
    monkeypatch.setattr(run, "_execute", lambda notebook, path, **_: names.append(path.stem))
    return names


def test_a_later_notebook_reads_the_files_of_an_earlier_one(folder, capsys):
    paths = [write(folder, "01_one.ipynb", WRITE), write(folder, "02_two.ipynb", READ)]
    copies = run_notebooks(paths, folder / "out")
    assert copies == [folder / "out/notebooks/01_one.ipynb", folder / "out/notebooks/02_two.ipynb"]
    assert printed(copies[1]) == "from one\n"
    assert re.search(r"\[2/2\] 02_two: \d+ s", capsys.readouterr().out)
    assert [p.name for p in (folder / "out/notebooks").iterdir() if p.suffix != ".ipynb"] == []


def test_it_runs_from_inside_a_notebook_whose_event_loop_is_running(folder):
    async def cell():
        return run_notebooks([write(folder, "01_one.ipynb", "print('ran')")], folder / "out")

    with ThreadPoolExecutor(1) as notebook:
        (copy,) = notebook.submit(lambda: asyncio.run(cell())).result()
    assert printed(copy) == "ran\n"


def test_the_kernel_has_the_settings_the_caller_folder_and_no_widget_state(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("REPLIB_SEED", "1")
    code = "import os, json\nprint(json.dumps([dict(os.environ), os.getcwd()]))"
    widget = "import ipywidgets\nipywidgets.IntSlider()"
    (copy,) = run_notebooks([write(folder, "x.ipynb", code, widget)], folder / "out", env={"REPLIB_MODEL": "m"})
    environ, cwd = json.loads(printed(copy).splitlines()[0])
    names = ("REPLIB_MODEL", "REPLIB_SEED", "REPLIB_OUT", "PYTHONHASHSEED", "OMP_WAIT_POLICY")
    assert [environ[name] for name in names] == ["m", "1", str(folder / "out"), "0", "passive"]
    assert cwd == str(folder)
    assert "widgets" not in nbformat.read(copy, as_version=4).metadata


def test_an_unchanged_notebook_is_kept(folder, monkeypatch, capsys):
    names = executions(monkeypatch)
    paths = [write(folder, "01.ipynb", "1"), write(folder, "02.ipynb", "2")]
    for _ in range(2):
        run_notebooks(paths, folder / "out")
    assert names == ["01", "02"]
    assert "[2/2] 02: unchanged, kept" in capsys.readouterr().out


def test_a_changed_notebook_runs_again_with_all_after_it_and_none_before(folder, monkeypatch):
    names = executions(monkeypatch)
    paths = [write(folder, f"0{i}.ipynb", str(i)) for i in (1, 2, 3)]
    run_notebooks(paths, folder / "out")
    write(folder, "02.ipynb", "20")
    names.clear()
    run_notebooks(paths, folder / "out")
    assert names == ["02", "03"]


def test_running_one_notebook_makes_those_after_it_stale(folder, monkeypatch):
    names = executions(monkeypatch)
    paths = [write(folder, f"0{i}.ipynb", str(i)) for i in (1, 2)]
    run_notebooks(paths, folder / "out")
    write(folder, "01.ipynb", "10")
    run_notebooks(paths[:1], folder / "out")
    names.clear()
    run_notebooks(paths, folder / "out")
    assert names == ["02"]


def test_outputs_and_metadata_are_no_part_of_the_source(folder, monkeypatch):
    names = executions(monkeypatch)
    path = write(folder, "01.ipynb", "1")
    run_notebooks([path], folder / "out")
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["kernelspec"] = {"name": "other", "display_name": "other"}
    notebook.cells[1].execution_count = 4
    nbformat.write(notebook, path)
    run_notebooks([path], folder / "out")
    assert names == ["01"]


@pytest.mark.parametrize("what", ["setting", "inherited", "package", "file"])
def test_whatever_a_result_depends_on_makes_it_stale(what, folder, monkeypatch):
    names = executions(monkeypatch)
    path, prompts = write(folder, "01.ipynb", "1"), folder / "prompts.csv"
    prompts.write_text("a")
    monkeypatch.setattr(run, "PACKAGE", folder / "package")
    (folder / "package").mkdir()
    env = {"REPLIB_HARMFUL": str(prompts)}
    run_notebooks([path], folder / "out", env=env)
    if what == "setting":
        env["REPLIB_SEED"] = "1"
    elif what == "inherited":
        monkeypatch.setenv("REPLIB_SEED", "1")
    elif what == "package":
        (folder / "package/new.py").write_text("x = 1")
    else:
        prompts.write_text("ab")
    run_notebooks([path], folder / "out", env=env)
    assert names == ["01", "01"]


def test_a_failure_names_notebook_cell_and_error_and_keeps_what_was_done(folder, monkeypatch):
    good = write(folder, "01_good.ipynb", "print('kept')")
    bad = write(folder, "02_bad.ipynb", "print('so far')", "value = 1\nraise RuntimeError('too hot')")
    with pytest.raises(ReplibError, match=r"02_bad\.ipynb, code cell 2 \(value = 1\): RuntimeError: too hot"):
        run_notebooks([good, bad], folder / "out")
    assert printed(folder / "out/notebooks/01_good.ipynb") == "kept\n"
    assert printed(folder / "out/failed/02_bad.ipynb") == "so far\n"
    assert not (folder / "out/notebooks/02_bad.ipynb").exists()
    names = executions(monkeypatch)
    run_notebooks([good, write(folder, "02_bad.ipynb", "print('mended')")], folder / "out")
    assert names == ["02_bad"]


@pytest.mark.parametrize(
    "code, reason",
    [("import time\ntime.sleep(60)", "longer than"), ("import os\nos._exit(1)", "kernel died")],
)
def test_a_cell_that_hangs_or_kills_its_kernel_is_named(code, reason, folder):
    with pytest.raises(ReplibError, match=rf"x\.ipynb, code cell 1 \(import \w+\): .*{reason}"):
        run_notebooks([write(folder, "x.ipynb", code)], folder / "out", timeout=3)


def test_a_missing_notebook_and_a_file_that_is_none(folder):
    with pytest.raises(ReplibError, match=r"gone\.ipynb does not exist"):
        run_notebooks([folder / "gone.ipynb"], folder / "out")
    (folder / "text.ipynb").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ReplibError, match=r"text\.ipynb is not a notebook"):
        run_notebooks([folder / "text.ipynb"], folder / "out")


def test_an_output_folder_that_cannot_be_made(folder):
    (folder / "out").write_text("a file")
    with pytest.raises(ReplibError, match="--out or REPLIB_OUT"):
        run_notebooks([write(folder, "x.ipynb", "1")], folder / "out")


def test_an_output_folder_that_cannot_be_written(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ReplibError, match="read-only"):
        run_notebooks([write(folder, "x.ipynb", "1")], folder / "out")


def test_ctrl_c_keeps_finished_notebooks_and_leaves_no_kernel(folder):
    first = write(folder, "01.ipynb", "1")
    pid = "import os, pathlib, time\npathlib.Path(os.environ['REPLIB_OUT'], 'pid').write_text(str(os.getpid()))"
    second = write(folder, "02.ipynb", pid, "time.sleep(60)")
    command = [sys.executable, "-m", "replib", "run", str(first), str(second), "--out", str(folder / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for((folder / "out/pid").exists)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert f"kept in {folder / 'out'}" in errors
    assert [p.name for p in (folder / "out/notebooks").iterdir()] == ["01.ipynb"]
    wait_for(lambda: not alive(int((folder / "out/pid").read_text())))


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
