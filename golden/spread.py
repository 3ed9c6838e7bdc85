"""One run over several processes, or the machines of a Dask cluster: the same results, whoever works on them and whatever dies."""

import concurrent.futures
import functools
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from ..ref.op import OPS, Op, op_named
from .errors import UsageError
from .precision import precision_named
from .tasks import subject_of
from .vectors import Store, directions
from .verify import DEFAULT_PRECISIONS, TIMEOUT, CaseResult, Key, Report, is_bare, verify

TRIES = 3  # of a group whose worker dies: what kills every worker is the group's own doing


_opened = threading.local()


def opened(*about: Any) -> Any:
    """The subject that this worker has asked before, or a new one in its place: loading one takes longer than most groups."""
    if getattr(_opened, "about", None) != about:
        if end := getattr(_opened, "end", None):
            end()
        _opened.about = None
        subject = _opened.subject = subject_of(*about)
        _opened.about, _opened.end = about, Finalize(None, subject.close, exitpriority=1)
    return _opened.subject


@functools.cache
def store_in(directory: Path) -> Store:
    return Store(directory)


def run_group(
    subject: str, op: str, direction: str, precision: str, store: Path, options: Mapping[str, Any], keep: bool = False
) -> list[CaseResult]:
    """All cases of one op, direction and precision: what decides which cases are explained stays in one place. A worker that lives no
    longer than the run keeps its subject."""
    own = "backward" if direction == "backward" and is_bare(subject) else "forward"
    about = (options.get("framework"), options.get("ties"), own, True, options.get("timeout", TIMEOUT))
    asked = opened(subject, *about) if keep else subject
    return verify(asked, op, precision=precision, direction=direction, isolate=True, store=store_in(store), **options).results


def groups(subject: str, ops: Sequence[Op], precisions: Sequence[str], direction: str | None) -> Iterator[tuple[str, str, str]]:
    """(op, direction, precision) in the order of a run by one process."""
    own = "backward" if direction == "backward" else "forward"
    for op in ops:
        for way in directions(op) if direction is None and not is_bare(subject) else (direction or own,):
            if way in directions(op):
                yield from ((op.name, way, precision) for precision in precisions)


@contextmanager
def executor(jobs: int, scheduler: str | None) -> Iterator[Any]:
    """Processes of this machine, or a Dask cluster's workers. Leaving it early ends what is under way."""
    if scheduler is None:
        pool = concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
        try:
            yield pool
        except BaseException:
            for process in list((pool._processes or {}).values()):  # they ask subjects that may hang
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        return
    try:
        from distributed import Client
    except ImportError:
        raise UsageError('a scheduler needs Dask: pip install "leadline[cluster]"') from None
    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise UsageError(f"no scheduler answers at {scheduler}: {error}") from error
    with client:
        yield client.get_executor(pure=False)


def spread(
    subject: str,
    names: Sequence[str] | None,
    *,
    jobs: int = 1,
    scheduler: str | None = None,
    precision: Sequence[str] | None = None,
    direction: str | None = None,
    attrs: Mapping[str, Any] | None = None,
    store: Store | None = None,
    done: Mapping[Key, CaseResult] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    on_result: Callable[[CaseResult], None] | None = None,
    **options: Any,
) -> Report:
    """As verify of a subject's name, each op, direction and precision asked by one of `jobs` processes or of a cluster's workers.

    Results come in the order of a single process and are its results. A group whose worker was killed is asked again.
    """
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}; expected at least 1")
    store = store or Store()
    if jobs == 1 and scheduler is None:
        about: dict[str, Any] = {"precision": precision, "direction": direction, "attrs": attrs, "store": store, "done": done}
        return verify(subject, names, isolate=True, progress=progress, on_result=on_result, **about, **options)
    if names is None and is_bare(subject):
        raise UsageError(f"{subject} is one callable; name what it computes (--op)")
    ops = list(OPS.values()) if names is None else [op_named(name) for name in names]
    precisions = [precision_named(p).name for p in precision or DEFAULT_PRECISIONS]
    asked = list(groups(subject, ops, precisions, direction))
    report, tries = Report(), dict.fromkeys(asked, 0)
    finished: dict[tuple[str, str, str], list[CaseResult]] = {}
    while len(finished) < len(asked):
        with executor(jobs, scheduler) as pool:
            futures = {}
            for group in asked:
                if group in finished:
                    continue
                op, way, p = group
                own = {k: v for k, v in (attrs or {}).items() if names is not None or k in OPS[op].attrs}
                mine = {k: v for k, v in (done or {}).items() if k[1:4] == group}
                futures[group] = pool.submit(
                    run_group, subject, op, way, p, store.directory, {**options, "attrs": own, "done": mine}, scheduler is None
                )
            for group, future in futures.items():
                try:
                    results = future.result()
                except BrokenProcessPool:  # all that was under way is lost; what was finished is not
                    tries[group] += 1
                    if tries[group] == TRIES:
                        raise UsageError(f"{' '.join(group)} of {subject} killed its worker {TRIES} times") from None
                    break
                finished[group] = results
                report.results += results
                if progress:
                    progress(len(finished), len(asked), " ".join(group))
                for result in results if on_result else ():
                    if (done or {}).get(result.key) is None:
                        on_result(result)  # type: ignore[misc]
    return report
