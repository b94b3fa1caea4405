"""The streamed core of attention with a pair bias, as a custom operator: a few queries at a time."""

from ..biased_attention.streaming import streamed

attention_pair_bias_streamed = streamed("attention_pair_bias")
