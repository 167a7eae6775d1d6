"""Scoring language models: likelihood of text, masked prediction, pseudo-likelihood.

What lives here: loading any Hugging Face model directory for scoring, turning text into rows, and the scores. What must
not: printing, writing files, or the training loop. The verbs `evaluate`, `generate` and `fill` stand on this folder.
"""
