"""The models of the paper, each with the run it was trained in, as configs."""

from examples.gpt.core.config import Config
from examples.gpt.core.recipes import Preset

# 480 sequences of 1,024 tokens, warm-up, k = 10 and the rest are the paper's; the refresh
# is ours: 16 sequences in 16 groups, where the paper has 240 in one.
_GPT2 = Config().replace(
    context=1024,
    vocabulary=50304,  # of which GPT-2's text uses 50,257: a multiple of 128 is faster
    init_std=0.02,
    dtype="bfloat16",
    steps=100_000,
    batch=480,
    warmup=2_000,
    final_fraction=0.05,
    debias=False,
    validate_every=1_000,
    checkpoint_every=1_000,
)
_NEOX = _GPT2.replace(
    architecture="neox", context=2048, vocabulary=50432, batch=2048, bias=True
)


def _sized(base: Config, preset: Preset, layers: int, heads: int, width: int) -> Config:
    return base.replace(preset=preset, layers=layers, heads=heads, width=width)


PRESETS: dict[Preset, Config] = {
    "bytes": Config(),
    "gpt2-30m": _sized(_GPT2, "gpt2-30m", 6, 6, 384),
    "gpt2-125m": _sized(_GPT2, "gpt2-125m", 12, 12, 768),
    "gpt2-355m": _sized(_GPT2, "gpt2-355m", 24, 16, 1024),
    "gpt2-770m": _sized(_GPT2, "gpt2-770m", 36, 20, 1280),
    "gpt2-1.5b": _sized(_GPT2, "gpt2-1.5b", 48, 25, 1600),
    "neox-1.5b": _sized(_NEOX, "neox-1.5b", 48, 24, 1536),
    # 6.65 billion without its head, 6.86 with it.
    "neox-6.6b": _sized(_NEOX, "neox-6.6b", 32, 32, 4096),
}
