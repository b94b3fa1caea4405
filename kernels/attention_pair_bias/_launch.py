"""The Triton kernels of attention with a pair bias, as a custom operator. Importing this imports Triton."""

from ..biased_attention._launch import fused

attention_pair_bias_triton = fused("attention_pair_bias")
