"""GPT-2 and GPT-NeoX in Flax NNX, trained with Sophia: `python -m examples.gpt --help`.

Read `train.py` from top to bottom: it is the whole loop. `step.py` is what it compiles,
`model.py` the network, `layout.py` how it lies on a mesh, `config.py` every choice. Text
becomes tokens by `prepare.py`, and batches by `data.py`; `sample.py`, `evaluate.py` and
`export.py` use what is trained; `launch/` starts it all on TPU pods, Slurm and Kubernetes.
"""
