"""GPT-2 and GPT-NeoX in Flax NNX, trained with Sophia: `python -m examples.gpt --help`.

`core` is to be copied and changed: read `core/train.py` first. `operations` has the
checkpoints, metrics and processes of a run, `tools` the other commands, and `launch` the
scripts for TPU pods, Slurm and Kubernetes. docs/trainer/index.md shows the structure.
"""
