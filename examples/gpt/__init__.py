"""A GPT-2 in Flax NNX, trained with Sophia: `python -m examples.gpt --help`.

Read `train.py` from top to bottom; it is the whole loop. `config.py` says what the
default run is and why, `model.py` is the network, `data.py` the corpus, `plot.py` the
picture.
"""
