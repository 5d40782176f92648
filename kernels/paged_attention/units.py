"""Scores are exponents of 2, as processors have an instruction, or a short series, for those."""

LOG2E = 1.4426950408889634  # log2 e: times this, a score of the softmax is one of 2^s
