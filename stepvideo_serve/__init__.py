"""Serve Step-Video-TI2V (text + first image + motion score -> video) from Triton Inference Server.

The folders in the order of the data: text, vae, dit, (fused,) sampling, video, pipeline; then the machinery: weights,
memory, engine, assembly, parallel, scheduling, planning, doctor, serving, launch. errors, geometry, request and config
are the vocabulary that every folder may import.

Glossary. One word means one thing.

request     what a caller asks for: a prompt, an image, numbers; validated into a GenerationRequest
field       one input of a request (request/fields.py): its name, type, default and bounds
answer      what a caller gets for a request: progress, then a result or an error
report      REPORT, the JSON beside a result: seconds, checkpoint, warnings. Between processes: the message with which
            the leader tells a step
stage       one part of the way from request to video: text, image encoder, denoiser, decoder. Also the model of the
            server that does it: `text_encoder`, `vae_encoder`, `dit_denoiser`, `vae_decoder`
BLS         Triton's calls from one model of a server to another (Business Logic Scripting)
stub        the process in which Triton runs one of these models

job         what the ranks compute for a request: latents, text states and settings of the denoising loop
run         a job or a decoding on its way through the queue of `dit_denoiser`: waiting, at the ranks, parked or done
turn        the time for which one run has the ranks, until it ends or is parked
parked      of a run: stopped between two steps for a run of a higher priority; it keeps its latents and goes on later
step        one interval of the time grid of a job; the latents move once per step
evaluation  one call of the DiT for a step, with all guidance branches
forecast    a step without an evaluation: the velocity is extrapolated, as a preset allows
preset      a named rule that says which steps are evaluated (QUALITY); its price is what it costs in quality
branch      one text of classifier-free guidance: the conditional or the unconditional one
pace        what a server has measured of its own seconds, for quotes and estimates; the ledger is where that is kept

rank        one process of the group that computes a job, with a GPU of its own where there are GPUs
leader      rank 0, which alone reports to `dit_denoiser`
group       all ranks of `dit_denoiser`, over the life of the server
generation  the ranks of a group between two rebuilds; a rank that dies ends its generation
layout      how the ranks share the work: guidance branches x tensor slices x token slices, as "cfg2.tp4.sp1"
mark        a rank's message that a step has ended, by which the group sees a rank that is stuck
heartbeat   a message that says only that its sender lives: of a rank to `dit_denoiser`, of a model to the metrics, of
            `ti2v` to a caller whose request waits
arena       shared memory for the tensors of one message between `dit_denoiser` and the ranks
lease       how long a run, or a job of the gateway, is kept without a sign of who follows it

graph       one part of a network as it is exported, with a fixed signature (EngineSpec)
segment     the graph of a piece of a block, cut where ranks exchange tensors
engine      a graph compiled by TensorRT
plan        what TensorRT decided for an engine: its layers, types and memory; `make layouts` computes predictions
profile     the range of sizes that an engine takes
runner      what runs a graph or an engine: tensors by name in, tensors by name out
twin        a graph in bf16 or FP8 turned into fp16, so that ONNX Runtime can run it for a comparison
parity      the comparison of a graph or an engine with torch in fp32; its report is in the manifest
chunk       17 frames <-> 3 latent frames, which the Video-VAE treats alone
"""
