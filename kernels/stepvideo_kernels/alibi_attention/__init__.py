"""Causal grouped-query attention with the sqrt-ALiBi bias of Step-LLM, computed in the kernel."""
