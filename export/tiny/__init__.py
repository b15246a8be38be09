"""A tiny random checkpoint in the official layout: its configuration and its tokenizers."""
