"""Sophia taken apart: what each part is worth, and what tuning is worth.

    python -m benchmarks.ablations          # about an hour on two CPU cores
    python -m benchmarks.ablations --full   # at a size for a GPU

Trains the byte GPT of `examples/gpt`, in three parts:

1. Ten optimizers at equal tuning: for each the same number of trials, at the same points of
   a quasi-random search (Halton's) over three settings, at one seed. Each range of a
   learning rate is a factor of 16 wide.
2. The best of each at other seeds, in as many steps and in half as many.
3. Sophia-G at its best, one part changed at a time, at those seeds.

Every trial is written to `runs/ablations.jsonl` when it ends; stopped and started again,
the command goes on from there.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import qmc

from benchmarks import ablations_report, machine, measure, trials
from benchmarks.trials import SPACES, Outcome, Settings, Trial
from examples.gpt.config import Config as RunConfig

KEPT = Path("runs/ablations.jsonl")
NO_CLIP = 1e30  # JSON has no infinity


@dataclasses.dataclass(frozen=True)
class Config:
    """Sophia taken apart."""

    run: RunConfig = dataclasses.field(
        default_factory=lambda: RunConfig(
            steps=400, batch=32, vocabulary=256, refresh_batch=16, groups=16
        )
    )
    """The model and its training. Of its settings of an optimizer none is used."""

    trials: int = 12
    """Of the search, for each optimizer."""

    seeds: int = 3
    """At which the best is run again. The search has another."""


FULL = Config(
    run=RunConfig(
        steps=4000,
        layers=6,
        heads=8,
        width=512,
        context=256,
        batch=64,
        vocabulary=256,
        refresh_batch=16,
        groups=16,
    ),
    trials=24,
)


def measure_ablations(config: Config) -> dict[str, Any]:
    size, run = config.run, functools.partial(_run_all, config.run)
    assert size.groups is not None
    make = functools.partial(Trial, steps=size.steps, groups=size.groups)
    points = qmc.Halton(3, rng=np.random.default_rng(0)).random(config.trials)
    searched = {
        name: [make(name, space.settings(point)) for point in points]
        for name, space in SPACES.items()
    }
    losses = {t: outcome.loss for t, outcome in run(_flat(searched.values())).items()}
    best = {
        name: min(of_one, key=losses.__getitem__).settings
        for name, of_one in searched.items()
    }
    seeds = range(1, 1 + config.seeds)

    def seeded(trial: Trial) -> list[Trial]:
        return [dataclasses.replace(trial, seed=seed) for seed in seeds]

    again = {name: seeded(make(name, settings)) for name, settings in best.items()}
    halves = {
        name: [dataclasses.replace(trial, steps=size.steps // 2) for trial in of_one]
        for name, of_one in again.items()
    }
    changed = [
        {"part": part, "value": value, "trials": seeded(trial)}
        for part, value, trial in _changes(make("sophia_g", best["sophia_g"]))
    ]
    parts = [*again.values(), *halves.values(), *(c["trials"] for c in changed)]
    outcomes = run(_flat([*searched.values(), *parts]))

    def shown(of_one: list[Trial]) -> list[dict[str, Any]]:
        return [
            {"trial": dataclasses.asdict(t), "outcome": dataclasses.asdict(outcomes[t])}
            for t in of_one
        ]

    results = {
        "config": dataclasses.asdict(config),
        "ranges": {
            name: {
                "learning_rate": space.learning_rate,
                "gamma": space.gamma,
                "1 - b2": space.memory,
                "1 - b1": trials.MEMORY_OF_GRADIENTS,
            }
            for name, space in SPACES.items()
        },
        "search": {name: shown(of_one) for name, of_one in searched.items()},
        "seeds": {name: shown(of_one) for name, of_one in again.items()},
        "halves": {name: shown(of_one) for name, of_one in halves.items()},
        "changes": [{**c, "trials": shown(c["trials"])} for c in changed],
    }
    results = json.loads(json.dumps(results, default=str))
    ablations_report.draw(results, machine.folder())
    return results


def _changes(base: Trial) -> Iterable[tuple[str, str, Trial]]:
    """Sophia-G with one part changed, but for the grid of gamma and b2."""

    def change(**settings: float) -> Trial:
        return dataclasses.replace(
            base, settings=dataclasses.replace(base.settings, **settings)
        )

    own: Settings = base.settings
    yield "as it is", "", base
    for share in (1, 0.1, 0.01):
        rate = float(f"{share * own.learning_rate:.3g}")
        trial = change(clip_threshold=NO_CLIP, learning_rate=rate)
        yield "no clip", f"learning rate × {share:g}", trial
    for interval in (1, 10, 100):
        yield "k", str(interval), change(update_interval=interval)
    for groups in (1, base.groups // 4, base.groups):
        yield "groups", str(groups), dataclasses.replace(base, groups=groups)
    for debias in (True, False):
        yield "debias", str(debias), dataclasses.replace(base, debias=debias)
    for eps in (1e-12, 1e-7, 1e-5, 1e-3):
        yield "eps", f"{eps:g}", change(eps=eps)
    for b1 in (0.6, 0.8, 0.9, 0.965):
        yield "b1", f"{b1:g}", change(b1=b1)
    for b2 in (0.9, 0.99, 0.999):
        for times in (0.25, 1, 4):
            gamma = float(f"{times * own.gamma:.3g}")
            yield "gamma × b2", f"{gamma:g}, {b2:g}", change(gamma=gamma, b2=b2)


def _run_all(size: RunConfig, wanted: list[Trial]) -> dict[Trial, Outcome]:
    """The outcomes of all these, of which those are made that were not kept."""
    kept = _kept(size)
    missing = [trial for trial in dict.fromkeys(wanted) if trial not in kept]
    # Together what shares a program; not too many, so that no process ends long after.
    chunks: dict[tuple[Any, ...], list[list[Trial]]] = {}
    for trial in sorted(missing, key=lambda t: str(t.program())):
        of_program = chunks.setdefault(trial.program(), [[]])
        if len(of_program[-1]) == 12:
            of_program.append([])
        of_program[-1].append(trial)
    work = sorted(_flat(chunks.values()), key=len, reverse=True)
    if missing:
        print(f"{len(missing)} trials to go, {len(wanted) - len(missing)} kept", flush=True)
    if jax.default_backend() != "cpu":
        for chunk in work:
            _run_and_keep(size, chunk, KEPT)
    elif work:
        context = multiprocessing.get_context("spawn")
        cores = sorted(os.sched_getaffinity(0))
        queue = context.Queue()
        for core in cores:
            queue.put(core)
        with concurrent.futures.ProcessPoolExecutor(
            len(cores), context, initializer=_take_a_core, initargs=(queue,)
        ) as pool:
            for done in [pool.submit(_run_and_keep, size, chunk, KEPT) for chunk in work]:
                done.result()
    kept = _kept(size)
    return {trial: kept[trial] for trial in wanted}


def _take_a_core(queue: Any) -> None:
    """A trial too small for two cores has one for itself."""
    os.sched_setaffinity(0, {queue.get()})


def _run_and_keep(size: RunConfig, chunk: list[Trial], path: Path) -> None:
    for trial in chunk:
        outcome = trials.run(trial, size)
        line = json.dumps(
            {
                "key": _key(size),
                "trial": dataclasses.asdict(trial),
                "outcome": dataclasses.asdict(outcome),
            }
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(line + "\n")
        print(
            f"{trial.optimizer:22} {outcome.loss:.3f}  {outcome.seconds:3.0f} s  "
            f"seed {trial.seed}, {trial.steps} steps, {trial.settings}",
            flush=True,
        )


def _kept(size: RunConfig) -> dict[Trial, Outcome]:
    if not KEPT.exists():
        return {}
    lines = [json.loads(line) for line in KEPT.read_text().splitlines()]
    return {
        Trial(**line["trial"] | {"settings": Settings(**line["trial"]["settings"])}): (
            Outcome(**line["outcome"])
        )
        for line in lines
        if line["key"] == _key(size)
    }


def _key(size: RunConfig) -> str:
    """What has to be the same for a trial that was kept to count."""
    where = {k: v for k, v in machine.describe().items() if k != "date"}
    return json.dumps([where, dataclasses.asdict(size)], default=str)


def _flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def table(results: dict[str, Any]) -> str:
    return ablations_report.tables(results)


if __name__ == "__main__":
    measure.run("ablations", measure_ablations, table, small=Config(), full=FULL)
