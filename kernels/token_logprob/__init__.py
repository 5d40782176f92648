"""Log-probabilities of given tokens without ever holding the logits of all of them."""

from stillhouse.kernels.token_logprob.chunked import token_logprob

__all__ = ["token_logprob"]
