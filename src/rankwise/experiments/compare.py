"""Running an experiment: workers that claim cells, one record each, progress with time left."""

from __future__ import annotations

import logging
import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from rankwise.artifacts import EXPERIMENT_FILE
from rankwise.errors import ConfigError
from rankwise.experiments.architectures import read_config
from rankwise.experiments.bench import Bench
from rankwise.experiments.board import Board
from rankwise.experiments.cell_records import FailureRecord
from rankwise.experiments.cells import Cell, Group
from rankwise.experiments.config import ExperimentConfig
from rankwise.experiments.running import run_cell
from rankwise.files import write_errors_explained, write_text

logger = logging.getLogger(__name__)

LOCKS = "locks"
POLL_SECONDS = 0.5
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Progress:
    """How far an experiment is.

    Attributes:
        cells: All of them.
        done: Finished before or in this run.
        failed: Failed in this run.
        seconds_left: Estimate; None before the first cell of this run is finished.
    """

    cells: int
    done: int
    failed: int
    seconds_left: float | None

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", about {duration(self.seconds_left)} left"
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done} of {self.cells} cells{failed}{left}"


def run_experiment(
    config: ExperimentConfig,
    *,
    notify: Notify = logger.info,
    show: Callable[[Progress], None] | None = None,
) -> Board:
    """Run every cell that has no record yet; what fails is recorded and left to the next call.

    Models and data that are not there stop it before the first cell.

    Args:
        config: The experiment.
        notify: Called with a line of text for every cell that ends.
        show: Called with the progress, about twice a second where there are several workers.

    Returns:
        The board with all records there are.

    Raises:
        ConfigError: The device is not there, or a model; or a task's data have changed.
        DataError: A task's data cannot be read.
        FileError: The folder cannot be written to.
    """
    bench = Bench(config.runs_folder, choose_device(config.device))
    board = Board(config)
    _find_sources(board, bench)
    with write_errors_explained(config.runs_folder):
        board.folder.mkdir(parents=True, exist_ok=True)
        (config.runs_folder / LOCKS).mkdir(exist_ok=True)
    started = Path(config.output) / EXPERIMENT_FILE
    write_text(started, config.model_dump_json(indent=1) + "\n")
    board.since = started.stat().st_mtime_ns
    for cell in list(board.cells()):
        board.failure_path(cell).unlink(missing_ok=True)  # they are tried again
    watch = _Watch(board, notify, show)
    if config.workers == 1:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        work(board, bench, watch.look)
    else:
        _run_workers(board, bench.device, watch)
    watch.look(last=True)
    return board


def _find_sources(board: Board, bench: Bench) -> None:
    """Load the data, and look for the model, of every task that has cells to run.

    Raises:
        ConfigError: A model is not there, or model or data are not those of the task's records.
        DataError: A task's data cannot be read.
    """
    tasks = {g.task.name: g.task for g in board.groups if not _is_finished(board, g)}
    for model in dict.fromkeys(task.task.model for task in tasks.values()):
        read_config(model)
    records = board.records() if tasks else []
    for task in tasks.values():
        for changed in bench.changed_since([r for r in records if r.task == task.name], task):
            raise ConfigError(
                f"task {task.name}: its {changed} changed since its finished records were made, "
                "although the settings are the same; restore what was there, or choose another "
                "output."
            )


def _is_finished(board: Board, group: Group) -> bool:
    cells = board.finals(group)
    return bool(cells) and all(board.path(cell).is_file() for cell in cells)


def work(board: Board, bench: Bench, after_each: Callable[[], None] | None = None) -> None:
    """Claim and run cells until none is left; waits for those whose search others still run."""
    while True:
        claimed, waiting = _claim(board)
        if claimed is None:
            if not waiting:
                return
            time.sleep(POLL_SECONDS)
            continue
        cell, lock = claimed
        try:
            _run_and_record(board, cell, bench)
        finally:
            lock.release()
        if after_each is not None:
            after_each()


def _claim(board: Board) -> tuple[tuple[Cell, FileLock] | None, bool]:
    """A cell nobody else runs, with its lock; and whether others run cells that are not done.

    The lock is the operating system's, so that it is gone when its process is.
    """
    busy = False
    for cell in board.cells():
        if _is_over(board, cell):
            continue
        lock = FileLock(board.config.runs_folder / LOCKS / f"{cell.file_name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            busy = True
            continue
        if not _is_over(board, cell):
            return (cell, lock), busy
        lock.release()
    # a search that ended while the list was walked may have opened new cells
    return None, busy or any(not _is_over(board, cell) for cell in board.cells())


def _is_over(board: Board, cell: Cell) -> bool:
    """Whether the cell is finished or has failed."""
    return board.path(cell).is_file() or board.has_failed(cell)


def _run_and_record(board: Board, cell: Cell, bench: Bench) -> None:
    failed = board.failure_path(cell)
    try:
        run_cell(cell, bench, board.config.folders).save(board.path(cell))
        failed.unlink(missing_ok=True)
    except Exception as error:
        # one cell's fault is not the others'; it is recorded and makes the command exit with 1
        FailureRecord(
            cell.name,
            cell.config_hash,
            f"{type(error).__name__}: {error}",
            traceback.format_exc(),
            datetime.now(UTC).isoformat(timespec="seconds"),
        ).save(failed)


def _run_workers(board: Board, device: torch.device, watch: _Watch) -> None:
    config = board.config
    context = multiprocessing.get_context("spawn")
    arguments = (config.model_dump(mode="json"), str(device), board.since)
    processes: list[SpawnProcess] = [
        # not as daemons, which may start no process: lm-eval runs generated code in one
        context.Process(target=_worker, args=arguments)
        for _ in range(config.workers)
    ]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(POLL_SECONDS)
            watch.look()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
    for process in processes:
        if process.exitcode:
            watch.notify(
                f"worker {process.pid} ended with exit code {process.exitcode}; its cell has no "
                "record and is run by the next call (memory may have run out: lower workers)"
            )


def _worker(document: dict[str, Any], device: str, since: int) -> None:
    config = ExperimentConfig.model_validate(document)
    torch.set_num_threads(config.threads or 1)
    work(Board(config, since), Bench(config.runs_folder, torch.device(device)))


class _Watch:
    """Tells of every cell that ends, and estimates the time left."""

    def __init__(
        self,
        board: Board,
        notify: Notify,
        show: Callable[[Progress], None] | None,
    ) -> None:
        self.board = board
        self.notify = notify
        self._show = show
        self._started = time.monotonic()
        self._changed = self._last_change()
        self._seen = {c.file_name for c in board.cells() if board.path(c).is_file()}
        self._before = len(self._seen)
        self._failed: set[str] = set()
        self._total = board.total()
        if self._before:
            notify(f"{self._before} of {self._total} cells are finished already")

    def look(self, *, last: bool = False) -> None:
        """Read what is new, if files came or went or this is the last look; show the progress.

        Walking hundreds of cells twice a second would take a fifth of a core from the workers.
        """
        changed = self._last_change()
        if last or changed != self._changed:
            self._changed = changed  # asked for before reading, so that nothing is missed
            self._read()
        if self._show is not None:
            self._show(self.progress())

    def _read(self) -> None:
        """Tell of every cell that ended since the last time."""
        self._total = self.board.total()
        for cell in list(self.board.cells()):
            if cell.file_name in self._seen or cell.file_name in self._failed:
                continue
            if self.board.path(cell).is_file():
                self._seen.add(cell.file_name)
                self._tell(cell)
            elif _is_over(self.board, cell):
                self._failed.add(cell.file_name)
                failure = self.board.failure(cell)
                self.notify(f"{self.progress()}: {cell.name} failed: {failure and failure.error}")

    def _last_change(self) -> int:
        """When a file of the records' folder last came or went."""
        return self.board.folder.stat().st_mtime_ns

    def progress(self) -> Progress:
        """How far it is; the time left from the mean time of a cell so far."""
        total, done = self._total, len(self._seen)
        ended = done - self._before + len(self._failed)
        left = None
        if ended:
            left = (time.monotonic() - self._started) / ended * (total - done - len(self._failed))
        return Progress(total, done, len(self._failed), left)

    def _tell(self, cell: Cell) -> None:
        record = self.board.record(cell)
        assert record is not None
        seconds = sum(record.seconds[part] for part in ("prepare", "train", "evaluate"))
        if record.diverged_at is not None:
            outcome = f"diverged at step {record.diverged_at}"
        else:
            outcome = f"{record.metric} " + ("?" if record.value is None else f"{record.value:.4f}")
        size = "" if record.size is None else f", {record.size}"
        self.notify(f"{self.progress()}: {cell.name}: {outcome}{size} ({seconds:.0f} s)")


def choose_device(name: str) -> torch.device:
    """The device of an experiment.

    Raises:
        ConfigError: There is no GPU where one is asked for.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': there is no GPU; use 'auto' or 'cpu'.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def duration(seconds: float) -> str:
    """A time span in the two largest units that matter.

    Example:
        >>> duration(7270)
        '2 h 1 min'
    """
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes - 60 * hours} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
