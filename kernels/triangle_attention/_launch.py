"""Triangle attention's Triton kernels, as a custom operator. Importing this imports Triton."""

from ..biased_attention._launch import fused

triangle_attention_triton = fused("triangle_attention")
