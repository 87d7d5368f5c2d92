"""Execute notebooks in order, each in a fresh kernel, and do only what is missing.

A notebook reads what the ones before it wrote into ``out``. An executed copy carries a key made of everything
it depends on: its source, the ``REPLIB_*`` values, the package, the data, the keys of the copies before it.
"""

import asyncio
import hashlib
import json
import os
import signal
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from replib.core.errors import ReplibError
from replib.core.settings import PREFIX, ROOT
from replib.core.storage import replacing

try:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbformat import NotebookNode
except ModuleNotFoundError as error:
    raise ReplibError(f"{error.name} is missing, so notebooks cannot run: pip install 'replib[notebooks]'.") from error
PACKAGE = Path(__file__).parents[1]
# Two runs on one machine print the same tables: sets iterate alike. Idle threads spin a little before they sleep, which
# saves a run that has the machine to itself a tenth to a third of its time. The price is paid in company: two runs side
# by side take about twice as long as they would without, and with a count of 20000 five times as long or more.
_KERNEL = {"PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000"}


def run_notebooks(
    paths: Sequence[Path], out: Path, *, env: Mapping[str, str] | None = None, timeout: int = 1800
) -> list[Path]:
    """Execute ``paths`` in order and return their executed copies in ``out/notebooks``.

    A copy whose key is unchanged is kept. A relative path inside ``env`` means what it means to the caller.

    Args:
        paths: Notebooks; a later one may read the files of an earlier one.
        out: Output folder, given to each kernel as ``REPLIB_OUT``.
        env: ``REPLIB_*`` values for the kernels, over those of this process.
        timeout: Seconds one cell may take.

    Raises:
        ReplibError: naming the notebook, the cell and the error; copies finished before it are kept.
    """
    folder = _folder(out / "notebooks")
    inherited = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    values = inherited | dict(env or {}) | {f"{PREFIX}OUT": str(out.absolute())}
    basis = _digest(json.dumps(values, sort_keys=True), *_package(), *_data(values))
    for number, path in enumerate(paths, 1):
        notebook, copy, label = _read(path), folder / path.name, f"[{number}/{len(paths)}] {path.stem}"
        key = _digest(basis, _source(notebook), *_keys_before(copy))
        if _stored_key(copy) == key:
            print(f"{label}: unchanged, kept", flush=True)
            continue
        print(f"{label} ...", flush=True)
        start = time.monotonic()
        _execute(notebook, path, env=values, timeout=timeout, failed=out / "failed" / path.name)
        notebook.metadata["replib"] = {"key": key}
        _write(notebook, copy)
        print(f"{label}: {time.monotonic() - start:.0f} s", flush=True)
    return [folder / path.name for path in paths]


def _execute(notebook: NotebookNode, path: Path, *, env: dict[str, str], timeout: int, failed: Path) -> None:
    reached: list[int] = []
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        # Otherwise a start-up warning of the kernel lands, now and then, among the outputs of the first cell.
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        store_widget_state=False,
        on_notebook_start=_leave_interrupts,
        on_cell_execute=lambda cell_index, **_: reached.append(cell_index),
    )
    try:
        _complete(client.async_execute(cwd=os.getcwd(), env=_KERNEL | os.environ | env))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        _folder(failed.parent)
        _write(notebook, failed)
        raise ReplibError(_failure(path, notebook.cells[: reached[-1] + 1], error, failed)) from error


def _complete(work: Coroutine[Any, Any, object]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as aside:  # called from a notebook, whose own loop is running
        aside.submit(asyncio.run, work).result()


def _leave_interrupts(**_: object) -> None:
    # nbclient turns Ctrl-C into a dead kernel; without its handler the interrupt reaches the caller as such,
    # and leaving the event loop still shuts the kernel down.
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)


def _failure(path: Path, reached: Sequence[NotebookNode], error: Exception, failed: Path) -> str:
    number = sum(cell.cell_type == "code" for cell in reached)
    opening = reached[-1].source.strip().split("\n")[0]
    reasons: dict[type, str] = {
        CellTimeoutError: "it took longer than one cell may",
        DeadKernelError: "its kernel died, most often because the memory was exhausted",
    }
    reason = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else reasons[type(error)]
    where = f"{path.name}, code cell {number} ({opening})"
    return f"{where}: {reason}. Finished notebooks are kept; the outputs of this one so far are in {failed}."


def _read(path: Path) -> NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise ReplibError(f"{path} does not exist: give the path of a notebook, such as notebooks/*.ipynb.") from None
    except (ValueError, AttributeError) as error:
        raise ReplibError(
            f"{path} is not a notebook ({type(error).__name__}): give the path of an .ipynb file."
        ) from None


def _write(notebook: NotebookNode, path: Path) -> None:
    with replacing(path) as partial:
        nbformat.write(notebook, partial)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReplibError(
            f"{path} cannot be made ({error.strerror}): choose another folder with --out or REPLIB_OUT."
        ) from error
    if not os.access(path, os.W_OK):
        raise ReplibError(f"{path} is read-only: choose another folder with --out or REPLIB_OUT.")
    return path


def _stored_key(copy: Path) -> str | None:
    return _read(copy).metadata.get("replib", {}).get("key") if copy.exists() else None


def _keys_before(copy: Path) -> list[str]:
    return [str(_stored_key(other)) for other in sorted(copy.parent.glob("*.ipynb")) if other.name < copy.name]


def _source(notebook: NotebookNode) -> str:
    return json.dumps([(cell.cell_type, cell.source) for cell in notebook.cells])


def _package() -> Iterator[str]:
    for file in sorted(PACKAGE.rglob("*")):
        if file.suffix in {".py", ".js"}:
            yield f"{file.relative_to(PACKAGE)} {_digest(file.read_text(encoding='utf-8'))}"


def _data(values: Mapping[str, str]) -> Iterator[str]:
    """Size and time of every file of the organism and of the files and folders the settings name."""
    named = [Path(value) for name, value in sorted(values.items()) if name != f"{PREFIX}OUT"]
    for root in (ROOT / "data" / "organism", *named):
        for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if file.is_file():
                yield f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
