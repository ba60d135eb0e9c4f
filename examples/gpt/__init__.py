"""GPT-2 and GPT-NeoX in Flax NNX, trained with Sophia: `python -m examples.gpt --help`.

Read `train.py` from top to bottom; it is the whole loop, and `step.py` is what it compiles.
`config.py` says what the default run is and why, `presets.py` has the paper's models and
`recipes.py` their learning rates; `model.py` is the network, with `attention.py` and, in 16
bits, `head.py`; `layout.py` how it lies on a mesh, `optimizer.py` the chain, `state.py` and
`checkpoint.py` what a run goes on from.

Text becomes tokens by `prepare.py` (on `sources.py` and `tokenizer.py`), and batches by
`data.py`. What is trained is used by `sample.py`,
`evaluate.py` (SuperGLUE by `harness.py`) and `export.py`; `hugging_face.py` reads and
writes GPT-2's weights. `launch/` starts it all on Cloud TPU, Slurm and Kubernetes.
"""
