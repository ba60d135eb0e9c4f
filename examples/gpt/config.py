"""Every choice of a run, and why the default is what it is."""

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from examples.gpt.recipes import RECIPES, Optimizer, Preset, Recipe

_POSITIVE = (
    *("steps", "layers", "heads", "width", "context", "vocabulary", "init_std"),
    *("batch", "accumulate", "loss_chunk", "refresh_batch", "groups", "update_interval"),
    *("log_every", "validate_every", "validation_batches"),
    *("checkpoint_every", "keep", "keep_every", "num_processes", "clip_norm"),
)
_PATHS = ("data", "out", "init_from", "resume_from")


class ConfigError(ValueError):
    """A choice that can't be, found before anything is compiled where it can be."""

    def text(self) -> str:
        """The error and its notes, for a person."""
        return "\n".join([f"error: {self}", *getattr(self, "__notes__", [])])


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a GPT with Sophia.

    Without arguments it reads the source of Python's standard library as bytes, trains a
    small GPT-2 for a few minutes on two CPU cores, and writes its configuration, metrics,
    checkpoints and a picture of the loss to `runs/sophia_g`. Started again it goes on
    from its last checkpoint.
    """

    # The default is the smallest run that is a fair picture of Sophia. The model, 2 layers
    # of width 64 on 64 bytes, is small enough that two million bytes teach it words and
    # indentation in two minutes, and large enough that curvatures differ over
    # orders of magnitude: rare bytes against spaces, norms against matrices. 500 steps of
    # 64 sequences are 50 refreshes, enough for their average to settle (with `debias`).

    preset: Preset = "bytes"
    """A model of the paper and the run it was trained in; every other choice overrides
    its."""

    optimizer: Optimizer = "sophia_g"
    """Sophia with Gauss-Newton-Bartlett or with Hutchinson's estimates, AdamW or Lion."""

    compare: Optimizer | None = None
    """Train again with this one, at its own best: same parameters, same batches."""

    data: Path | None = None
    """A folder that `python -m examples.gpt.prepare` made, a text file, or a folder of
    them. The standard library's source by default."""

    verify_data: bool = True
    """Compare the checksums of a prepared folder before training."""

    init_from: Path | None = None
    """Start from weights alone: those of a run's folder, or of one of its checkpoints, or
    GPT-2's in Hugging Face's format, which want `bias` and a `vocabulary` of 50257."""

    resume_from: Path | None = None
    """Go on from another run, in a folder of its own and perhaps with another schedule: its
    folder, or one of its checkpoints, as runs/gpt/checkpoints/40000."""

    out: Path | None = None
    """Folder for what comes out; in `runs/`, by the optimizer's name, by default."""

    steps: int = 500
    """Number of training steps."""

    seed: int = 0
    """Seed of the parameters, the batches, the sampled labels and the sampled text."""

    architecture: Literal["gpt2", "neox"] = "gpt2"
    """GPT-2, or GPT-NeoX: rotary positions, attention beside the MLP, a head of its own."""

    layers: int = 2
    """Number of transformer blocks."""

    heads: int = 4
    """Number of attention heads; divides the width."""

    width: int = 64
    """Width of the residual stream."""

    context: int = 64
    """Length of a sequence, in tokens."""

    vocabulary: int | None = None
    """Number of tokens; as many as the data has, up to a multiple of 128, by default."""

    bias: bool = False
    """Give linear layers and norms a bias, as GPT-2 has; the paper's models have none."""

    init_std: float | None = None
    """Standard deviation of the first weights; 1 / √fan-in by default."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; parameters and the optimizer's averages are float32."""

    remat: Literal["none", "dots", "full"] = "none"
    """What is computed again on the way back, to save memory: nothing, what is no product
    of matrices, or all of a block but its input."""

    loss_chunk: int = 256
    """Number of positions of a sequence whose logits are there at once in float32."""

    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """What computes attention: XLA, or the kernels of cuDNN on a GPU and of Pallas on a
    TPU, which hold no (T, T) weights. The best that there is by default."""

    within_documents: bool = False
    """Let a token attend to its own document only, which a separator ends."""

    separator: int | None = None
    """The token that ends a document, with `within_documents`; the data's by default."""

    batch: int = 64
    """Number of sequences in a batch."""

    accumulate: int = 1
    """Number of micro-batches that the batch is computed in, one after another."""

    mesh: str = ""
    """How devices are laid out, as `data=8,fsdp=4,tensor=2`; all data by default."""

    refresh_batch: int | None = None
    """Number of sequences of the batch that a refresh of the Hessian looks at; as many as
    there are groups, and 16 or more, by default."""
    # A quarter of the batch, in a group for each sequence: see benchmarks/estimate.py. In
    # a run this short it is worth little.

    groups: int | None = None
    """Number of groups of the refresh; a group for each of its sequences by default, of
    which there are 16 or, on more devices, one for each."""

    update_interval: int = 10
    """Number of steps from one refresh to the next."""
    # The paper's.

    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """The learning rate after its rise: it falls as a cosine, stays, or stays and then
    falls in a line (warm-up, stable, decay)."""

    warmup: int | None = None
    """Number of steps in which the learning rate rises; a tenth of all by default."""

    decay: int | None = None
    """Number of steps in which it falls with `wsd`, the last; a tenth of all by default."""

    final_fraction: float = 0.0
    """Where the learning rate ends, as a fraction of its peak."""

    clip_norm: float = 1.0
    """The largest global norm of a gradient; a larger one is scaled down to it."""

    debias: bool = True
    """Correct the bias of the average of the Hessian."""
    # In 500 steps the average is still far from its value, which without the correction is
    # a gamma several times smaller than the one asked for.

    learning_rate: float | None = None
    """Peak of the learning rate; the optimizer's own best, like the next six."""

    b1: float | None = None
    """Decay of the moving average of gradients."""

    b2: float | None = None
    """Decay of the moving average of the Hessian, or of the squared gradients."""

    gamma: float | None = None
    """Sophia's scale of the Hessian, in place of `share`; larger clips less."""

    share: float | None = None
    """The share of each parameter's entries that Sophia's gamma leaves unclipped."""

    nesterov: bool | None = None
    """Nesterov's momentum, for Sophia and AdamW."""

    weight_decay: float | None = None
    """Decoupled weight decay, on matrices and embeddings only."""

    log_every: int = 10
    """Number of steps from one line of metrics.jsonl to the next."""

    validate_every: int = 50
    """Number of steps from one validation to the next."""

    validation_batches: int = 8
    """Number of batches of a validation, always the same ones."""

    checkpoint_every: int = 100
    """Number of steps from one checkpoint to the next; the last step has one too."""

    keep: int = 2
    """Number of checkpoints that are kept, the newest."""

    keep_every: int | None = None
    """Keep those of these steps, too."""

    tensorboard: bool = False
    """Write the metrics for TensorBoard, too (needs tensorboardX)."""

    wandb: str | None = None
    """Send the metrics to this project of Weights & Biases, too (needs wandb)."""

    profile: int = 0
    """Number of steps, from the eleventh, whose profile is written to `out`/profile."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where processes are started by hand. On Cloud TPU, Slurm
    and Kubernetes they find each other."""

    num_processes: int | None = None
    """Number of processes, with `coordinator`."""

    process_id: int | None = None
    """Number of this process, with `coordinator`."""

    def recipe(self) -> Recipe:
        """The optimizer's settings: its own, where none are given."""
        own = RECIPES[self.preset][self.optimizer]
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(Recipe)}
        if self.gamma is not None or self.share is not None:  # one in place of the other
            own = dataclasses.replace(own, gamma=None, share=None)
        return dataclasses.replace(own, **{k: v for k, v in given.items() if v is not None})

    def fitted(
        self,
        vocabulary: int,
        parts: int = 1,
        separator: int | None = None,
        began: Mapping[str, Any] = MappingProxyType({}),
    ) -> "Config":
        """The same run for data of this vocabulary, in batches spread in so many parts.

        A run that goes on keeps the groups that it `began` with, however many there are.
        """
        groups = self.groups or began.get("groups")
        fewest = math.lcm(self.groups or 1, parts)
        sizes = [n for n in range(fewest, self.batch, fewest) if self.batch % n == 0]
        refresh_batch = self.refresh_batch or began.get("refresh_batch")
        if refresh_batch is None:
            refresh_batch = next((n for n in sizes if n >= 16), self.batch)
        if self.vocabulary is not None and self.vocabulary < vocabulary:
            raise ConfigError(
                f"`vocabulary` must hold the data's, got a model of {self.vocabulary} "
                f"tokens for data of {vocabulary}."
            )
        if self.separator is not None or not self.within_documents:
            separator = self.separator
        return dataclasses.replace(
            self,
            separator=separator,
            vocabulary=self.vocabulary or -(-vocabulary // 128) * 128,
            refresh_batch=refresh_batch,
            groups=groups or refresh_batch,
        )

    def compared(self) -> "Config":
        """The same run with the optimizer `compare`, at its own settings."""
        assert self.compare is not None
        unset = {f.name: None for f in dataclasses.fields(Recipe)}
        return dataclasses.replace(self, optimizer=self.compare, compare=None, **unset)

    def warmup_steps(self) -> int:
        return self.steps // 10 if self.warmup is None else self.warmup

    def decay_steps(self) -> int:
        return self.steps // 10 if self.decay is None else self.decay

    def folder(self) -> Path:
        name = (
            self.optimizer if self.compare is None else f"{self.optimizer}_{self.compare}"
        )
        return self.out or Path("runs") / name

    def as_json(self) -> dict:
        """All of it, with the recipe filled in."""
        fields = dataclasses.asdict(self) | dataclasses.asdict(self.recipe())
        fields["warmup"] = self.warmup_steps()
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}

    @classmethod
    def from_json(cls, fields: dict) -> "Config":
        """The run of which this is `as_json`."""
        known: dict[str, Any] = {
            f.name: fields[f.name] for f in dataclasses.fields(cls) if f.name in fields
        }
        for name in _PATHS:
            if known.get(name) is not None:
                known[name] = Path(known[name])
        return cls(**known)

    def check(self) -> None:
        """Raises ConfigError if the run can't be."""
        for name in _POSITIVE:
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"`{name}` must be positive, got {value}.")
        for name in ("seed", "profile", "final_fraction"):
            if not (value := getattr(self, name)) >= 0:
                raise ConfigError(f"`{name}` must not be negative, got {value}.")
        recipe = self.recipe()
        for name in ("learning_rate", "gamma"):
            if (value := getattr(recipe, name)) is not None and not value > 0:
                raise ConfigError(f"`{name}` must be positive, got {value}.")
        for name in ("b1", "b2"):
            if not 0 <= (value := getattr(recipe, name)) < 1:
                raise ConfigError(f"`{name}` must be at least 0 and below 1, got {value}.")
        if not recipe.weight_decay >= 0:
            raise ConfigError(
                f"`weight_decay` must not be negative, got {recipe.weight_decay}."
            )
        for name in ("gamma", "share"):
            if getattr(self, name) is not None and "sophia" not in self.optimizer:
                raise ConfigError(f"`{name}` is Sophia's, and {self.optimizer} has none.")
        if self.gamma is not None and self.share is not None:
            raise ConfigError(
                f"`share` chooses gamma, got `gamma` {self.gamma} too: leave one out."
            )
        if recipe.share is not None and not 0 < recipe.share < 1:
            raise ConfigError(f"`share` must be between 0 and 1, got {recipe.share}.")
        if self.nesterov and self.optimizer == "lion":
            raise ConfigError("`nesterov` is for Sophia and AdamW, and lion has none.")
        if not 0 <= self.warmup_steps() < self.steps:
            raise ConfigError(
                f"`warmup` must be less than `steps`, got {self.warmup_steps()} of "
                f"{self.steps}."
            )
        if not 0 <= self.decay_steps() <= self.steps - self.warmup_steps():
            raise ConfigError(
                "`decay` must end with the run, after `warmup`, got "
                f"{self.decay_steps()} and {self.warmup_steps()} of {self.steps} `steps`."
            )
        if self.init_from is not None and self.resume_from is not None:
            raise ConfigError(
                "`init_from` begins from weights alone and `resume_from` from all of a "
                "checkpoint: leave one out."
            )
        if self.width % self.heads:
            raise ConfigError(
                f"`heads` must divide `width`, got {self.heads} heads for {self.width}."
            )
        self._check_attention()
        self._check_refresh()
        if self.batch % self.accumulate:
            raise ConfigError(
                f"`accumulate` must divide `batch`, got {self.accumulate} micro-batches of "
                f"{self.batch} sequences."
            )
        by_hand = (self.coordinator, self.num_processes, self.process_id)
        if None in by_hand and any(value is not None for value in by_hand):
            raise ConfigError(
                "`coordinator`, `num_processes` and `process_id` belong together: give all "
                "three, or none where Cloud TPU, Slurm or Kubernetes starts the processes."
            )
        if self.architecture == "neox" and self.width // self.heads < 8:
            raise ConfigError(
                "`heads` of GPT-NeoX must be 8 wide or wider, for a quarter of each turns "
                f"with its position, got {self.heads} heads of {self.width}."
            )
        if self.profile and self.steps <= 11:
            raise ConfigError(
                f"`profile` begins at the eleventh step, got {self.steps} `steps`."
            )
        for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
            if getattr(self, name) and importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"`{name}` needs {package}, which is not there: pip install {package}."
                )
        if self.compare == self.optimizer:
            raise ConfigError(f"`compare` is the optimizer itself, {self.optimizer}.")
        out = self.folder()
        if out.exists() and not out.is_dir():
            raise ConfigError(f"`out` must be a folder, but {out} is a file.")

    def splash_fits(self, length: int) -> bool:
        """Whether Pallas' splash kernel takes sequences of this length."""
        return length % 128 == 0 and self.width // self.heads % 64 == 0

    def _check_attention(self) -> None:
        if self.attention in ("cudnn", "splash") and "sophia_h" in (
            self.optimizer,
            self.compare,
        ):
            raise ConfigError(
                "`attention` must be xla or auto for sophia_h, whose second derivative "
                f"{self.attention} does not have, got {self.attention}."
            )
        if self.attention == "cudnn" and self.within_documents:
            raise ConfigError(
                "`attention` must be another for `within_documents`, got cudnn, whose mask "
                "would be as large as the weights that it saves. Choose auto or xla."
            )
        if self.attention == "splash" and not self.splash_fits(self.context):
            raise ConfigError(
                "`attention` splash wants a `context` that is a multiple of 128 and heads "
                f"that are a multiple of 64 wide, got {self.context} and "
                f"{self.width // self.heads}."
            )

    def _check_refresh(self) -> None:
        if self.refresh_batch is None:
            return
        if self.refresh_batch > self.batch:
            raise ConfigError(
                f"`refresh_batch` is a part of the batch and can't be larger, got "
                f"{self.refresh_batch} of {self.batch} sequences."
            )
        if self.groups is not None and self.refresh_batch % self.groups:
            raise ConfigError(
                f"`groups` must divide `refresh_batch`, got {self.groups} groups of "
                f"{self.refresh_batch} sequences."
            )
        if self.batch % self.refresh_batch:
            raise ConfigError(
                "`refresh_batch` must divide `batch`, so that each device has its share, "
                f"got {self.refresh_batch} of {self.batch} sequences."
            )
