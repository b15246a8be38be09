"""Pixels at both ends: the first image in, frames, mp4 and previews out."""
