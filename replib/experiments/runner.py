"""Runner of the experiments: rows are made one by one by several processes and packed into one file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from replib.core.errors import ReplibError
from replib.core.settings import Settings
from replib.core.storage import Rows, finished, write_text
from replib.organism.recorded import recorded_file

_ResultRow = dict[str, Any]
Finished = Mapping[str, _ResultRow]
_Job = TypeVar("_Job")


@dataclass(frozen=True)
class Experiment(Generic[_Job]):
    """Jobs that give one row each; every row is on disk before the next job begins."""

    name: str
    """Module of ``replib.experiments``, and the packed file."""
    folder: Path
    stages: Sequence[Callable[[], list[list[_Job]]]]
    """Groups of jobs. A group stays in one process; a stage is listed once the stage before it is done."""
    key: Callable[[_Job], str]
    make: Callable[[_Job], _ResultRow]
    seconds: Callable[[_Job], float]
    """CPU seconds of a busy core that a job takes."""
    describe: Callable[[_ResultRow], str]
    contents: Callable[[Finished], dict[str, Any]]
    """Packed contents by finished row: facts first, then lists of rows, the last of them the results."""
    possible: Callable[[_Job, Finished], bool] = lambda _, __: True

    def missing(self, jobs: Sequence[_Job] | None = None) -> list[_Job]:
        """Possible jobs without a row, each once; by default of all stages."""
        done = finished(self.folder)
        if jobs is None:
            jobs = [job for stage in self.stages for group in stage() for job in group]
        return [job for job in dict.fromkeys(jobs) if self.key(job) not in done and self.possible(job, done)]

    def minutes(self) -> float:
        """Minutes of one busy core that the missing jobs take."""
        return sum(map(self.seconds, self.missing())) / 60

    def run(self, part: int = 1, parts: int = 1) -> None:
        """Do the missing jobs, in a share of the groups first and then in those of the other parts."""
        rows = Rows(self.folder / f"part-{part}-of-{parts}.jsonl")
        print(f"part {part} of {parts}: {self.minutes():.0f} core minutes for all parts together", flush=True)
        for stage in self.stages:
            for job in (job for group in _ordered(stage(), part, parts) for job in group):
                if self.missing([job]):
                    rows.put(self.key(job), row := self.make(job))
                    print(f"{self.describe(row)}; {self.minutes():.0f} core minutes left", flush=True)

    def pack(self) -> Path:
        """Write the finished rows to ``data/organism/<name>.json``, a line a row.

        Raises:
            ReplibError: no result is finished.
        """
        contents = self.contents(finished(self.folder))
        results = [*contents.values()][-1]
        if not results:
            raise ReplibError(f"No result in {self.folder}: run python -m replib.experiments.{self.name} first.")
        path = write_text(recorded_file(self.name), packed_text(contents))
        print(f"{len(results)} {[*contents][-1]}, {path.stat().st_size / 1e3:.0f} kB: {path}")
        return path


def _ordered(groups: list[list[_Job]], part: int, parts: int) -> list[list[_Job]]:
    """Own share forwards, all other groups backwards, so that two processes rarely meet."""
    own = range(part - 1, len(groups), parts)
    return [groups[i] for i in own] + [group for i, group in reversed([*enumerate(groups)]) if i not in own]


def packed_text(contents: Mapping[str, Any]) -> str:
    """JSON with indented facts; lists of rows have a compact line each."""
    lists = {name: value for name, value in contents.items() if value and _is_rows(value)}
    head = json.dumps({name: value for name, value in contents.items() if name not in lists}, indent=1)[:-2]
    lines = {name: ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) for name, rows in lists.items()}
    return head + "".join(f',\n "{name}": [\n{text}\n]' for name, text in lines.items()) + "\n}\n"


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def command_line(doc: str | None, build: Callable[[Settings], Experiment[Any]], *, shared: bool = True) -> None:
    """Command line of an experiment: do the missing jobs, or pack what is done.

    ``shared``: several processes may share the work. ``--part 1`` is short for 1/2.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n\n")[0])
    if shared:
        parser.add_argument("--part", default="1/1", help="1/2 and 2/2: the shares of two processes")
    parser.add_argument("--pack", action="store_true", help="write the finished rows to data/organism")
    arguments = parser.parse_args()
    part, _, parts = getattr(arguments, "part", "1/1").partition("/")
    torch.set_num_threads(1)
    experiment = build(Settings())
    if arguments.pack:
        experiment.pack()
    else:
        experiment.run(int(part), int(parts or 2))
