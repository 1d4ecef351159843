"""The edge to lm-eval: the model type `decdec`, its tasks, and token perplexity.

Importing this package imports nothing else: it happens at every interpreter start, see plugin.py.
"""
