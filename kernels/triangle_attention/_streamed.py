"""Triangle attention's streamed core, as a custom operator: a few rows at a time, the backward recomputed."""

from ..biased_attention.streaming import streamed

triangle_attention_streamed = streamed("triangle_attention")
