"""softmax(q k^T / sqrt(128)) v without a mask: self-attention of the DiT, and its attention to the text."""
