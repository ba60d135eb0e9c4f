"""The configuration of a training run. `--help` shows the comments on its fields."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Optimizer = Literal["sophia_g", "sophia_h", "adamw", "nadamw", "lion"]
_Gpt2 = Literal["gpt2-30m", "gpt2-125m", "gpt2-355m", "gpt2-770m", "gpt2-1.5b"]
Preset = Literal["bytes", _Gpt2, "neox-1.5b", "neox-6.6b"]

_NONNEGATIVE = {"seed", "warmup", "decay", "final_fraction", "b1", "b2"}
_NONNEGATIVE |= {"weight_decay", "process_id", "end_of_document"}
_FRACTIONS = {"b1", "b2", "share"}
_DIVISORS = {"heads": "width", "accumulate": "batch", "refresh_batch": "batch"}
_DIVISORS |= {"groups": "refresh_batch"}


class ConfigError(ValueError):
    """A user-facing configuration error, printed as one line."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture and size of the model, and how it is computed."""

    # GPT-2 or GPT-NeoX. GPT-NeoX has rotary position embeddings, computes attention and MLP
    # in parallel, and has an untied output head.
    architecture: Literal["gpt2", "neox"] = "gpt2"
    layers: int = 2  # Number of transformer blocks.
    heads: int = 4  # Number of attention heads. Must divide the width.
    width: int = 64  # Width of the residual stream.
    context: int = 64  # Sequence length in tokens.
    # Vocabulary size. The default is the tokenizer's size, rounded up to a multiple of 128.
    vocabulary: int | None = None
    bias: bool = False  # Use biases in linear layers and norms, as OpenAI's GPT-2 does.
    # Standard deviation of the initial weights. The default is 1/sqrt(fan-in).
    init_std: float | None = None
    # Dtype of the computation. Parameters and optimizer state are always float32.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Activations that the backward pass recomputes to save memory: none, all except the
    # results of matrix products (dots), or all except the input of each block (full).
    remat: Literal["none", "dots", "full"] = "none"
    # Maximum number of positions per sequence whose float32 logits are in memory at once.
    loss_chunk: int = 256
    within_documents: bool = False  # Attend only within a document. Requires prepared data.
    # ID of the end-of-document token. By default, the data's tokenizer defines it.
    end_of_document: int | None = None
    # Implementation of attention: XLA, cuDNN on GPUs, or the Pallas splash kernel on TPUs.
    # cuDNN and splash do not store attention weights. `auto` uses one of them if possible.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"


@dataclasses.dataclass(frozen=True)
class Training:
    """Number of steps, batch size, device mesh and learning rate schedule."""

    steps: int = 800  # Number of training steps.
    batch: int = 64  # Number of sequences in a batch.
    accumulate: int = 1  # Number of sequential micro-batches per batch.
    # Device mesh, such as `data=8,fsdp=4,tensor=2`. By default, all devices are on the axis
    # `data`. `auto` chooses mesh, accumulate and remat so that the run fits in memory.
    mesh: str = ""
    # Learning rate after the warm-up: a cosine decay, constant, or constant with a linear
    # decay at the end (wsd: warm-up, stable, decay).
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    # Number of linear warm-up steps. The default is a tenth of all steps.
    warmup: int | None = None
    # Number of linear decay steps at the end of `wsd`. The default is a tenth of all steps.
    decay: int | None = None
    final_fraction: float = 0.0  # Final learning rate as a fraction of the peak.
    clip_norm: float = 1.0  # Clip gradients to this maximum global norm.

    def warmup_steps(self) -> int:
        return self.steps // 10 if self.warmup is None else self.warmup

    def decay_steps(self) -> int:
        decay = self.steps // 10 if self.decay is None else self.decay
        return decay if self.schedule == "wsd" else 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the optimizer. Each preset has a recipe for each optimizer."""

    learning_rate: float  # Peak learning rate.
    b1: float  # Decay rate of the moving average of gradients.
    b2: float  # Decay rate of the moving average of the Hessian, or of squared gradients.
    weight_decay: float  # Decoupled weight decay, for matrices and embeddings only.
    # Scale of Sophia's Hessian. Larger values clip fewer entries. Not allowed with `share`.
    gamma: float | None = None
    # Target fraction of unclipped entries, for which Sophia chooses gamma at every step.
    share: float | None = None
    nesterov: bool | None = None  # Use Nesterov momentum. Lion does not support it.


@dataclasses.dataclass(frozen=True)
class Refresh:
    """Refreshes: steps in which Sophia uses a new estimate of the Hessian diagonal."""

    # Number of sequences per refresh. The default is the smallest divisor of the batch that
    # is at least 16 and a multiple of `groups` and of `data` x `fsdp`.
    refresh_batch: int | None = None
    groups: int | None = None  # Groups per refresh. By default, each sequence is a group.
    update_interval: int = 10  # Steps between refreshes. The paper uses 10.
    debias: bool = True  # Bias-correct the moving average of the Hessian, as in Adam.


@dataclasses.dataclass(frozen=True)
class Output:
    """Logging, validation and checkpoints."""

    log_every: int = 10  # Steps between rows of metrics.jsonl.
    validate_every: int = 50  # Steps between validations.
    validation_batches: int = 8  # Number of batches in the fixed validation set.
    checkpoint_every: int = 100  # Steps between checkpoints. The last step is saved too.
    keep: int = 2  # Number of newest checkpoints to keep.
    keep_every: int | None = None  # Also keep checkpoints at multiples of this step.
    wandb: str | None = None  # Also log to this Weights & Biases project (requires wandb).


@dataclasses.dataclass(frozen=True)
class Processes:
    """Connection between processes that are started by hand.

    Cloud TPU, Slurm and Kubernetes do not need these flags.
    """

    coordinator: str | None = None  # HOST:PORT of process 0.
    num_processes: int | None = None  # Number of processes. Requires `coordinator`.
    process_id: int | None = None  # Index of this process. Requires `coordinator`.


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a GPT with Sophia, AdamW, NAdamW or Lion.

    Without arguments, train a small GPT-2 on the source code of Python's standard library,
    for a few minutes on two CPU cores. The configuration, metrics, checkpoints and a plot
    of the loss are written to `runs/sophia_g`. If the same command is run again, it resumes
    from the last checkpoint.
    """

    preset: Preset = "bytes"  # Model and hyperparameters. Other flags override them.
    # Sophia with Gauss-Newton-Bartlett (g) or Hutchinson (h) estimates, or a baseline.
    optimizer: Optimizer = "sophia_g"
    # Also train with each of these optimizers, with its own recipe but the same initial
    # parameters and batches.
    compare: tuple[Optimizer, ...] = ()
    # A folder that `python -m examples.gpt.prepare` wrote, a text file, or a folder of text
    # files. The default is the source code of Python's standard library.
    data: Path | None = None
    # Load the initial weights from a run's folder, one of its checkpoints, or a folder of
    # GPT-2 weights in Hugging Face's format, which require --bias and --vocabulary 50257.
    init_from: Path | None = None
    # Resume this previous run in a new folder, possibly with a different schedule. Pass the
    # run's folder, or one of its checkpoints, such as runs/gpt/checkpoints/40000.
    resume_from: Path | None = None
    # Output folder, local or gs://BUCKET/NAME. The default is runs/OPTIMIZER.
    out: Path | None = None
    seed: int = 0  # Random seed for parameters, batches and Hessian estimates.

    model: ModelConfig = ModelConfig()
    training: Training = Training()
    recipe: Recipe = Recipe(9.15e-3, 0.883, 0.99, 0.6, gamma=0.148, nesterov=True)
    refresh: Refresh = Refresh()
    output: Output = Output()
    processes: Processes = Processes()

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / "_".join((self.optimizer, *self.compare))

    def as_json(self) -> dict[str, Any]:
        """Return all values in a flat dict, keyed by field name."""
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
        """Return the config with defaults resolved from the data and the devices.

        A resumed run keeps the groups and the refresh batch of its `saved` config.
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
        # Hutchinson estimates require second derivatives, which the kernels do not support.
        attention = "xla" if self.optimizer == "sophia_h" else model.attention
        return dataclasses.replace(
            self,
            model=dataclasses.replace(model, vocabulary=vocabulary, attention=attention),
            training=dataclasses.replace(training, warmup=training.warmup_steps()),
            refresh=dataclasses.replace(refresh, refresh_batch=size, groups=groups),
        )

    def check(self) -> None:
        """Raise ConfigError if a value is invalid."""
        values, model, recipe = self.as_json(), self.model, self.recipe
        for name, value in values.items():
            is_number = type(value) in (int, float)
            if is_number and not (value > 0 or (value == 0 and name in _NONNEGATIVE)):
                bound = "at least 0" if name in _NONNEGATIVE else "positive"
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
                "`warmup` must be less than `steps`, and `warmup` + `decay` at most `steps`"
                f", got {warmup} + {decay} and {steps}. Set --warmup or --decay."
            )
        given = [name for name in ("gamma", "share") if values[name] is not None]
        if len(given) != ("sophia" in self.optimizer):
            raise ConfigError(
                "Sophia requires either `gamma` or `share`, and other optimizers accept "
                f"neither, got {recipe.gamma} and {recipe.share} for {self.optimizer}."
            )
        if (self.optimizer, recipe.nesterov) in (("lion", True), ("nadamw", False)):
            raise ConfigError(
                f"`nesterov` must not be {recipe.nesterov} for {self.optimizer}."
            )
        if len({self.optimizer, *self.compare}) <= len(self.compare):
            raise ConfigError(
                "`compare` must list distinct optimizers other than `optimizer`, got "
                f"{self.optimizer} and {', '.join(self.compare)}."
            )
        if self.init_from is not None and self.resume_from is not None:
            raise ConfigError("`init_from` and `resume_from` are mutually exclusive.")
        if len({value is None for value in vars(self.processes).values()}) == 2:
            raise ConfigError(
                "`coordinator`, `num_processes` and `process_id` must be given together."
            )
