"""Prompt -> text states: Step-LLM for meaning, Hunyuan-CLIP for words that describe images."""
