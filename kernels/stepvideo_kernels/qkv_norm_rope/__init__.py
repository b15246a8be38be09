"""q and k: RMS norm and 3D RoPE; q, k and v: split out of the interleaved projection and laid out for attention."""
