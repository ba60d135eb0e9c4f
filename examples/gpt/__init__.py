"""GPT-2 and GPT-NeoX in Flax NNX, trained with Sophia: `python -m examples.gpt --help`.

`core` contains the code to copy and modify: read `core/train.py` first. `operations`
manages checkpoints, metrics and processes. `tools` implements the other commands. `launch`
contains scripts for TPU pods, Slurm and Kubernetes. docs/trainer/index.md has an overview.
"""
