"""Ops of the engine that stand alone, as torch functions, for people who use nothing else here."""

from alignpro.ops.linear_logprob import LinearLogprob as LinearLogprob
from alignpro.ops.linear_logprob import QuantizedWeight as QuantizedWeight
from alignpro.ops.linear_logprob import get_num_threads as get_num_threads
from alignpro.ops.linear_logprob import linear_logprob as linear_logprob
from alignpro.ops.linear_logprob import peak_bytes as peak_bytes
from alignpro.ops.linear_logprob import set_num_threads as set_num_threads
