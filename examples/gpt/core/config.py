"""Every choice of a run: a comment on each is what --help says.

There is one way from a command line to a run. A preset is a whole `Config`. `replace` gives
it what a flag says, of whatever part; another optimizer brings its own recipe. `check` says
what can't be, before anything is compiled. `fitted` fills in what follows from the data and
the devices, and what is trained, saved and compared with a checkpoint is that.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from examples.gpt.core.errors import need
from examples.gpt.core.recipes import RECIPES, Optimizer, Preset, Recipe

_PARTS = ("model", "training", "recipe", "refresh", "output", "processes")
# Numbers that may be 0; every other must be positive.
_MAY_BE_0 = ("seed", "separator", "warmup", "decay", "final_fraction", "b1", "b2")
_MAY_BE_0 += ("weight_decay", "profile", "process_id")
# What must divide what, so that its parts are alike.
_DIVIDES = {"heads": "width", "accumulate": "batch", "refresh_batch": "batch"}
_DIVIDES |= {"groups": "refresh_batch"}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is trained, and how it is computed."""

    # GPT-2, or GPT-NeoX: rotary positions, attention beside the MLP, a head of its own.
    architecture: Literal["gpt2", "neox"] = "gpt2"
    layers: int = 2  # Number of transformer blocks.
    heads: int = 4  # Number of attention heads; divides the width.
    width: int = 64  # Width of the residual stream.
    context: int = 64  # Length of a sequence, in tokens.
    # Number of tokens; by default as the data has, rounded up to 128s.
    vocabulary: int | None = None
    bias: bool = False  # Biases in linear layers and norms, as in GPT-2; not in the paper.
    init_std: float | None = None  # Spread of the first weights; 1/√fan-in by default.
    # The arithmetic; parameters and the optimizer's averages are float32.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # What is computed again on the way back, to save memory: nothing, what is no product
    # of matrices, or all of a block but its input.
    remat: Literal["none", "dots", "full"] = "none"
    # Positions of a sequence whose float32 logits exist at once; fewer take less memory.
    loss_chunk: int = 256
    # What computes attention: XLA, or the kernels of cuDNN on a GPU and of Pallas on a
    # TPU, which hold no (T, T) weights. The best that there is by default.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    within_documents: bool = False  # Let a token attend to its own document only.
    # The token that ends a document, with `within_documents`; the data's by default.
    separator: int | None = None

    def check_vocabulary(self, size: int) -> None:
        """Raises ConfigError if the model has fewer tokens than the data."""
        ours = self.vocabulary or size
        message = f"`vocabulary` must hold the data's {size}, got a model of {ours} tokens."
        need(ours >= size, message)

    def check(self) -> None:
        """Raises ConfigError if the model can't be."""
        need(
            self.architecture == "gpt2" or self.width // self.heads >= 8,
            "`heads` of GPT-NeoX must be 8 wide or wider, for a quarter of each turns with "
            f"its position, got {self.heads} heads for {self.width}.",
        )


@dataclasses.dataclass(frozen=True)
class Training:
    """How long it is trained, and in which batches."""

    steps: int = 500  # Number of training steps.
    batch: int = 64  # Number of sequences in a batch.
    accumulate: int = 1  # Number of micro-batches, one after another, that make a batch.
    mesh: str = ""  # The devices' layout, as `data=8,fsdp=4,tensor=2`; all data by default.
    # The learning rate after its rise: it falls as a cosine, stays, or stays and then
    # falls in a line (warm-up, stable, decay).
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    # Number of steps in which the learning rate rises; a tenth of all by default.
    warmup: int | None = None
    decay: int | None = None  # Last steps, in which `wsd` falls; a tenth of all by default.
    final_fraction: float = 0.0  # Where the learning rate ends, over its peak.
    clip_norm: float = 1.0  # A gradient of a larger global norm is scaled down to it.

    def warmup_steps(self) -> int:
        return self.steps // 10 if self.warmup is None else self.warmup

    def decay_steps(self) -> int:
        return self.steps // 10 if self.decay is None else self.decay

    def check(self) -> None:
        """Raises ConfigError if it can't be."""
        warmup, decay, steps = self.warmup_steps(), self.decay_steps(), self.steps
        message = f"`warmup` must be less than `steps`, got {warmup} of {steps}."
        need(warmup < steps, message)
        need(
            self.schedule != "wsd" or decay <= steps - warmup,
            f"`decay` must end with the run, after `warmup`, got {decay} and {warmup} of "
            f"{steps} `steps`.",
        )
        message = f"`final_fraction` must be at most 1, got {self.final_fraction}."
        need(self.final_fraction <= 1, message)


@dataclasses.dataclass(frozen=True)
class Refresh:
    """When Sophia's Hessian is estimated anew, and from what."""

    # Number of sequences of the batch that a refresh looks at; by default the fewest, but
    # at least 16, that devices and groups share evenly: see benchmarks/estimate.py.
    refresh_batch: int | None = None
    groups: int | None = None  # Groups a refresh averages; by default one a sequence.
    update_interval: int = 10  # Steps from one refresh to the next; 10 is the paper's.
    debias: bool = True  # Correct the bias of the average of the Hessian.


@dataclasses.dataclass(frozen=True)
class Output:
    """What is written while it is trained, and how often."""

    log_every: int = 10  # Number of steps from one line of metrics.jsonl to the next.
    validate_every: int = 50  # Number of steps from one validation to the next.
    validation_batches: int = 8  # Number of batches of a validation, always the same ones.
    checkpoint_every: int = 100  # Steps between checkpoints; the last step has one too.
    keep: int = 2  # Number of checkpoints that are kept, the newest.
    keep_every: int | None = None  # Keep one of every so many steps, too.
    tensorboard: bool = False  # Write metrics for TensorBoard, too (needs tensorboardX).
    wandb: str | None = None  # Send metrics to this Weights & Biases project (needs wandb).
    profile: int = 0  # Number of steps, from the eleventh, to profile in `out`/profile.


@dataclasses.dataclass(frozen=True)
class Processes:
    """For processes started by hand. Cloud TPU, Slurm and Kubernetes need none of these."""

    coordinator: str | None = None  # HOST:PORT of process 0.
    num_processes: int | None = None  # Number of processes, with `coordinator`.
    process_id: int | None = None  # Number of this process, with `coordinator`.


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a GPT with Sophia.

    Without arguments it reads the source of Python's standard library as bytes, trains a
    small GPT-2 for a few minutes on two CPU cores, and writes its configuration, metrics,
    checkpoints and a picture of the loss to `runs/sophia_g`. Started again it goes on
    from its last checkpoint.
    """

    preset: Preset = "bytes"  # A model of the paper and its run; other flags override it.
    # Sophia with Gauss-Newton-Bartlett or with Hutchinson's estimates, AdamW or Lion.
    optimizer: Optimizer = "sophia_g"
    # Train again with this one, at its own best: same parameters, same batches.
    compare: Optimizer | None = None
    # A folder that `python -m examples.gpt.prepare` made, a text file, or a folder of
    # them. The standard library's source by default.
    data: Path | None = None
    verify_data: bool = True  # Compare the checksums of a prepared folder before training.
    # Start from weights alone: those of a run's folder, or of one of its checkpoints, or
    # GPT-2's in Hugging Face's format, which want `bias` and a `vocabulary` of 50257.
    init_from: Path | None = None
    # Go on from another run, in a folder of its own and perhaps with another schedule: its
    # folder, or one of its checkpoints, as runs/gpt/checkpoints/40000.
    resume_from: Path | None = None
    # Folder for what comes out, here or as gs://BUCKET/NAME; runs/OPTIMIZER by default.
    out: Path | None = None
    seed: int = 0  # Seed of the parameters, the batches, and the sampled labels and text.

    model: ModelConfig = ModelConfig()
    training: Training = Training()
    recipe: Recipe = RECIPES["bytes"]["sophia_g"]
    refresh: Refresh = Refresh()
    output: Output = Output()
    processes: Processes = Processes()

    def replace(self, **choices: Any) -> "Config":
        """The same run but for these choices, of whatever part they are.

        A `preset` or an `optimizer` brings its own recipe, and one of `gamma` and `share`
        takes the place of the other.
        """
        base = self
        if choices.keys() & {"preset", "optimizer"}:
            preset = choices.get("preset", self.preset)
            own = RECIPES[preset][choices.get("optimizer", self.optimizer)]
            base = dataclasses.replace(self, recipe=own)
        gamma, share = choices.get("gamma"), choices.get("share")
        message = f"`share` chooses gamma, got `gamma` {gamma} too: leave one."
        need(gamma is None or share is None, message)
        if gamma is not None or share is not None:
            choices |= {"gamma": gamma, "share": share}
        for name in _PARTS:
            part = getattr(base, name)
            own = {k: choices.pop(k) for k in vars(part) if k in choices}
            choices[name] = dataclasses.replace(part, **own)
        return dataclasses.replace(base, **choices)

    def fitted(
        self,
        vocabulary: int,
        parts: int = 1,
        separator: int | None = None,
        began: Mapping[str, Any] = {},
    ) -> "Config":
        """The same run for data of this vocabulary, in batches spread in so many parts.

        A run that goes on keeps the groups that it `began` with, however many there are.
        """
        model, refresh, batch = self.model, self.refresh, self.training.batch
        model.check_vocabulary(vocabulary)
        fewest = math.lcm(refresh.groups or 1, parts)
        sizes = [n for n in range(fewest, batch, fewest) if batch % n == 0 and n >= 16]
        smallest = min(sizes, default=batch)
        size = refresh.refresh_batch or began.get("refresh_batch") or smallest
        choices: dict[str, Any] = {
            "vocabulary": model.vocabulary or -(-vocabulary // 128) * 128,
            "refresh_batch": size,
            "groups": refresh.groups or began.get("groups") or size,
        }
        if model.within_documents and model.separator is None:
            choices["separator"] = separator
        if self.optimizer == "sophia_h":  # no kernel has its second derivative
            choices["attention"] = "xla"
        return self.replace(**choices)

    def folder(self) -> Path:
        names = [self.optimizer, self.compare] if self.compare else [self.optimizer]
        return self.out or Path("runs") / "_".join(names)

    def as_json(self) -> dict[str, Any]:
        """All choices, whatever their part."""
        fields = dict(vars(self))
        for name in _PARTS:
            fields |= vars(fields.pop(name))
        fields["warmup"] = self.training.warmup_steps()
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Config":
        """The run of which this is `as_json`."""
        known = {name: fields[name] for name in cls().as_json() if name in fields}
        paths = ("data", "out", "init_from", "resume_from")
        known |= {name: Path(known[name]) for name in paths if known.get(name)}
        return cls().replace(**known)

    def check(self) -> None:
        """Raises ConfigError if the run can't be."""
        choices = self.as_json()
        for name, value in choices.items():
            if type(value) in (int, float) and name in _MAY_BE_0:
                need(value >= 0, f"`{name}` must not be negative, got {value}.")
            elif type(value) in (int, float):
                need(value > 0, f"`{name}` must be positive, got {value}.")
        for name, of in _DIVIDES.items():
            part, whole = choices[name], choices[of]
            message = f"`{name}` must divide `{of}` evenly, got {part} of {whole}."
            need(None in (part, whole) or whole % part == 0, message)
        self.model.check()
        self.training.check()
        self.recipe.check(self.optimizer)
        need(
            "sophia_h" not in (self.optimizer, self.compare)
            or self.model.attention in ("auto", "xla"),
            "`attention` must be xla or auto for sophia_h, whose second derivative "
            f"{self.model.attention} does not have.",
        )
        need(
            self.init_from is None or self.resume_from is None,
            "`init_from` begins from weights alone and `resume_from` from all of a "
            "checkpoint: leave one out.",
        )
        message = f"`compare` is the optimizer itself, {self.optimizer}."
        need(self.compare != self.optimizer, message)
        message = f"`profile` begins at the eleventh step, got {choices['steps']} `steps`."
        need(not self.output.profile or self.training.steps > 11, message)
        for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
            is_there = not getattr(self.output, name) or importlib.util.find_spec(package)
            need(bool(is_there), f"`{name}` needs {package}: pip install {package}.")
        given = [value is not None for value in dataclasses.astuple(self.processes)]
        need(
            all(given) or not any(given),
            "`coordinator`, `num_processes` and `process_id` belong together: give all "
            "three, or none where Cloud TPU, Slurm or Kubernetes starts the processes.",
        )
