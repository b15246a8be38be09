"""Flow matching: schedule, guidance and the denoising loop, as functions over tensors."""
