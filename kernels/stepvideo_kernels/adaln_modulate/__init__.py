"""LayerNorm and adaLN modulation, with the gated residual that precedes them."""
