"""Triton Inference Server's side: the only code that knows `triton_python_backend_utils`.

adapter          requests, responses and errors of the Python backend
public           the models ti2v, ti2v_unary and ti2v_quote
cancel           the model ti2v_cancel
launcher_folder  what the models keep in their launcher's folder: kept results, signs that cancel
remote_stages    the stages of the pipeline as calls to the models that follow
model_calls      such a call, and a run of a model that is fetched
stage_models     the models text_encoder, vae_encoder and vae_decoder
denoiser         the model dit_denoiser: a queue in front of the group of ranks
queued_model     what vae_decoder and dit_denoiser share: one run at a time, and cancelling it
mailbox          the responses of a run until they are fetched
stage_bounds     what internal models accept, whoever calls
rank_factory     what runs in a rank process
field_files      what follows from the table of request fields: `make fields`
observe/         metrics, logs, traces, deaths of threads
"""
