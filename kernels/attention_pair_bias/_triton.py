"""The Triton kernels of attention with a pair bias, as a custom operator. Importing this imports Triton."""

from .._biased_attention_launch import fused

attention_pair_bias_triton = fused("attention_pair_bias")
