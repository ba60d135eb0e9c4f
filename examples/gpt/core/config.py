"""The configuration of a run. The comment on each field is its text in `--help`."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Optimizer = Literal["sophia_g", "sophia_h", "adamw", "nadamw", "lion"]
_Gpt2 = Literal["gpt2-30m", "gpt2-125m", "gpt2-355m", "gpt2-770m", "gpt2-1.5b"]
Preset = Literal["bytes", _Gpt2, "neox-1.5b", "neox-6.6b"]

_MAY_BE_ZERO = {"seed", "warmup", "decay", "final_fraction", "b1", "b2"}
_MAY_BE_ZERO |= {"weight_decay", "process_id", "end_of_document"}
_FRACTIONS = {"b1", "b2", "share"}
_DIVISORS = {"heads": "width", "accumulate": "batch", "refresh_batch": "batch"}
_DIVISORS |= {"groups": "refresh_batch"}


class ConfigError(ValueError):
    """A user-facing configuration error, printed as one line."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network and its arithmetic."""

    # GPT-2, or GPT-NeoX with rotary positions, attention parallel to the MLP, and an
    # untied head.
    architecture: Literal["gpt2", "neox"] = "gpt2"
    layers: int = 2  # Number of transformer blocks.
    heads: int = 4  # Number of attention heads. Must divide the width.
    width: int = 64  # Width of the residual stream.
    context: int = 64  # Length of a sequence in tokens.
    # Number of tokens. The default is that of the data, rounded up to a multiple of 128.
    vocabulary: int | None = None
    bias: bool = False  # Use biases in linear layers and norms, as GPT-2 does.
    # Standard deviation of the initial weights. The default is 1/sqrt(fan-in).
    init_std: float | None = None
    # Dtype of the computation. Parameters and optimizer state are float32.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Values that the backward pass recomputes to save memory: none, all except matrix
    # products, or all except the input of each block.
    remat: Literal["none", "dots", "full"] = "none"
    # Positions of a sequence whose float32 logits are in memory at a time.
    loss_chunk: int = 256
    within_documents: bool = False  # Attend only within documents, of prepared data.
    # Token that ends a document. The default is the data's.
    end_of_document: int | None = None
    # Attention by XLA, by the cuDNN kernel on a GPU, or by the Pallas splash kernel on a
    # TPU. The kernels do not store the (T, T) weights. `auto` takes a kernel if possible.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"


@dataclasses.dataclass(frozen=True)
class Training:
    """Length, batches and learning rate schedule."""

    steps: int = 500  # Number of training steps.
    batch: int = 64  # Number of sequences in a batch.
    accumulate: int = 1  # Number of sequential micro-batches in a batch.
    # Layout of the devices, such as `data=8,fsdp=4,tensor=2`. The default is all `data`.
    # With `auto`, the memory of the devices determines mesh, accumulate and remat.
    mesh: str = ""
    # Learning rate after the warm-up: a cosine decay, constant, or constant with a linear
    # decay at the end.
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    # Steps of linear warm-up. The default is a tenth of all steps.
    warmup: int | None = None
    # Steps of the linear decay of `wsd`. The default is a tenth of all steps.
    decay: int | None = None
    final_fraction: float = 0.0  # Final learning rate as a fraction of the peak.
    clip_norm: float = 1.0  # Maximum global norm of the gradient.

    def warmup_steps(self) -> int:
        return self.steps // 10 if self.warmup is None else self.warmup

    def decay_steps(self) -> int:
        decay = self.steps // 10 if self.decay is None else self.decay
        return decay if self.schedule == "wsd" else 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of the optimizer. Each preset has a recipe for each optimizer."""

    learning_rate: float  # Peak of the learning rate.
    b1: float  # Decay of the moving average of gradients.
    b2: float  # Decay of the moving average of the Hessian, or of the squared gradients.
    weight_decay: float  # Decoupled weight decay of matrices and embeddings.
    # Scale of Sophia's Hessian. A larger value clips less. Excludes `share`.
    gamma: float | None = None
    # Target fraction of unclipped entries, from which Sophia finds gamma at every step.
    share: float | None = None
    nesterov: bool | None = None  # Nesterov's momentum. Lion does not support it.


@dataclasses.dataclass(frozen=True)
class Refresh:
    """Refreshes: new estimates of the diagonal of Sophia's Hessian."""

    # Sequences of the batch that a refresh uses. The default is the smallest number of at
    # least 16 that the devices and groups divide evenly.
    refresh_batch: int | None = None
    groups: int | None = None  # Groups of a refresh. The default is one for each sequence.
    update_interval: int = 10  # Steps between refreshes. The paper has 10.
    debias: bool = True  # Correct the bias of the average of the Hessian.


@dataclasses.dataclass(frozen=True)
class Output:
    """Logging, validation and checkpoints."""

    log_every: int = 10  # Steps between rows of metrics.jsonl.
    validate_every: int = 50  # Steps between validations.
    validation_batches: int = 8  # Batches of a validation. They are always the same.
    checkpoint_every: int = 100  # Steps between checkpoints. The last step has one too.
    keep: int = 2  # Number of newest checkpoints to keep.
    keep_every: int | None = None  # Also keep the checkpoints of every N-th step.
    wandb: str | None = None  # Also log to this Weights & Biases project (needs wandb).


@dataclasses.dataclass(frozen=True)
class Processes:
    """Connection of processes that are started by hand.

    Cloud TPU, Slurm and Kubernetes need none of these.
    """

    coordinator: str | None = None  # HOST:PORT of process 0.
    num_processes: int | None = None  # Number of processes, with `coordinator`.
    process_id: int | None = None  # Index of this process, with `coordinator`.


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a GPT with Sophia, AdamW, NAdamW or Lion.

    Without arguments, train a small GPT-2 on the source code of Python's standard library,
    for a few minutes on two CPU cores. The folder `runs/sophia_g` receives the
    configuration, metrics, checkpoints and a plot of the loss. The same command again
    resumes from the last checkpoint.
    """

    preset: Preset = "bytes"  # A model of the paper and its run. Other flags override it.
    # Sophia with Gauss-Newton-Bartlett or with Hutchinson's estimates, or a baseline.
    optimizer: Optimizer = "sophia_g"
    # Train again with each of these optimizers and their own recipes: same initial
    # parameters, same batches.
    compare: tuple[Optimizer, ...] = ()
    # A folder that `python -m examples.gpt.prepare` wrote, a text file, or a folder of text
    # files. The default is the source code of the standard library.
    data: Path | None = None
    # Start from the weights of a run's folder, of one of its checkpoints, or of a folder
    # of GPT-2 in Hugging Face's format. The latter requires --bias and --vocabulary 50257.
    init_from: Path | None = None
    # Resume from another run in a new folder, possibly with another schedule: a run's
    # folder, or one of its checkpoints, such as runs/gpt/checkpoints/40000.
    resume_from: Path | None = None
    # Output folder, local or gs://BUCKET/NAME. The default is runs/OPTIMIZER.
    out: Path | None = None
    seed: int = 0  # Seed of the parameters, the batches and the sampled labels.

    model: ModelConfig = ModelConfig()
    training: Training = Training()
    recipe: Recipe = Recipe(5e-3, 0.85, 0.99, 0.4, share=0.5, nesterov=True)
    refresh: Refresh = Refresh()
    output: Output = Output()
    processes: Processes = Processes()

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / "_".join((self.optimizer, *self.compare))

    def as_json(self) -> dict[str, Any]:
        """Return all values by the names of their flags."""
        flat = {}
        for name, value in vars(self).items():
            flat |= vars(value) if dataclasses.is_dataclass(value) else {name: value}
        return {k: str(v) if isinstance(v, Path) else v for k, v in flat.items()}

    def with_resolved_defaults(
        self,
        vocabulary: int,
        batch_shards: int = 1,
        saved: Mapping[str, Any] = {},
        end_of_document: int | None = None,
    ) -> "Config":
        """Return the config with the values that depend on the data and the devices.

        A run that is resumed keeps the groups of its `saved` values.
        """
        model, training, refresh = self.model, self.training, self.refresh
        unit = math.lcm(refresh.groups or 1, batch_shards)
        sizes = range(unit, training.batch, unit)
        fitting = [n for n in sizes if training.batch % n == 0 and n >= 16]
        smallest = min(fitting, default=training.batch)
        size = refresh.refresh_batch or saved.get("refresh_batch") or smallest
        groups = refresh.groups or saved.get("groups") or size
        vocabulary = model.vocabulary or -(-vocabulary // 128) * 128
        if model.within_documents and model.end_of_document is None:
            model = dataclasses.replace(model, end_of_document=end_of_document)
        # No attention kernel has the second derivative that Hutchinson's estimates need.
        attention = "xla" if self.optimizer == "sophia_h" else model.attention
        return dataclasses.replace(
            self,
            model=dataclasses.replace(model, vocabulary=vocabulary, attention=attention),
            training=dataclasses.replace(training, warmup=training.warmup_steps()),
            refresh=dataclasses.replace(refresh, refresh_batch=size, groups=groups),
        )

    def check(self) -> None:
        """Raise ConfigError for the first invalid value."""
        values, model, recipe = self.as_json(), self.model, self.recipe
        for name, value in values.items():
            is_number = type(value) in (int, float)
            if is_number and not (value > 0 or (value == 0 and name in _MAY_BE_ZERO)):
                bound = "at least 0" if name in _MAY_BE_ZERO else "positive"
                raise ConfigError(f"`{name}` must be {bound}, got {value}.")
            if name in _FRACTIONS and (value or 0) >= 1:
                raise ConfigError(f"`{name}` must be less than 1, got {value}.")
        for name, multiple in _DIVISORS.items():
            a, b = values[name], values[multiple]
            if None not in (a, b) and b % a:
                raise ConfigError(f"`{name}` must divide `{multiple}`, got {a} and {b}.")
        if model.architecture == "neox" and model.width // model.heads < 8:
            raise ConfigError(
                "`width` / `heads` must be at least 8 for neox, got "
                f"{model.width} / {model.heads}."
            )
        steps, warmup = self.training.steps, self.training.warmup_steps()
        decay = self.training.decay_steps()
        if warmup >= steps or warmup + decay > steps:
            raise ConfigError(
                f"`warmup` and `decay` must fit `steps`, got {warmup}, {decay} and {steps}."
                " Set --warmup."
            )
        given = [name for name in ("gamma", "share") if values[name] is not None]
        if len(given) != ("sophia" in self.optimizer):
            raise ConfigError(
                "Sophia needs one of `gamma` and `share`, and other optimizers none, got "
                f"{recipe.gamma} and {recipe.share} for {self.optimizer}."
            )
        if (self.optimizer, recipe.nesterov) in (("lion", True), ("nadamw", False)):
            raise ConfigError(
                f"`nesterov` must not be {recipe.nesterov} for {self.optimizer}."
            )
        if len({self.optimizer, *self.compare}) <= len(self.compare):
            raise ConfigError(
                "`compare` must name other optimizers, each of them once, got "
                f"{self.optimizer} and {', '.join(self.compare)}."
            )
        if self.init_from is not None and self.resume_from is not None:
            raise ConfigError("`init_from` and `resume_from` exclude each other.")
        if len({value is None for value in vars(self.processes).values()}) == 2:
            raise ConfigError(
                "`coordinator`, `num_processes` and `process_id` must be given together."
            )
