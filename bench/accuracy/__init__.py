"""What pruning costs in correct answers: a small LLaVA trained on synthetic pictures, and every rule measured on it.

``python -m bench.accuracy.train`` trains the model, ``python -m bench.accuracy.evaluate`` measures it.
"""
