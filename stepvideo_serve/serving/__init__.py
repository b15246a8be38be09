"""Triton Inference Server's side: the only code that knows `triton_python_backend_utils`.

adapter      requests, responses and errors of the Python backend
stages       the models text_encoder, vae_encoder and vae_decoder
denoiser     the model dit_denoiser: a queue in front of the group of ranks
queued       what vae_decoder and dit_denoiser share: one run at a time, and cancelling it
run_queue    the queue of runs
rank         what runs in a rank process
bls          the stages as calls to those models
public       the models ti2v and ti2v_unary
"""
