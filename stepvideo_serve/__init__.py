"""Serve Step-Video-TI2V (text + first image + motion score -> video) from Triton Inference Server.

The folders in the order of the data: text, vae, dit, (fused,) sampling, video, pipeline; then the machinery: weights,
memory, engine, assembly, parallel, scheduling, planning, doctor, serving, launch. errors, geometry, request and config
are the vocabulary that every folder may import.

Glossary. One word means one thing.

request     what a caller asks for: a prompt, an image, numbers; validated into a GenerationRequest
job         what the ranks compute for a request: latents, text states and settings of the denoising loop
run         a job or a decoding on its way through the queue of `dit_denoiser`: waiting, at the ranks, parked or done
turn        the time for which one run has the ranks, until it ends or is parked
step        one interval of the time grid of a job; the latents move once per step
evaluation  one call of the DiT for a step, with all guidance branches
branch      one text of classifier-free guidance: the conditional or the unconditional one
rank        one process of the group that computes a job, with a GPU of its own where there are GPUs
group       all ranks of `dit_denoiser`, over the life of the server
generation  the ranks of a group between two rebuilds; a rank that dies ends its generation
layout      how the ranks share the work: guidance branches x tensor slices x token slices, as "cfg2.tp4.sp1"
graph       one part of a network as it is exported, with a fixed signature (EngineSpec)
segment     the graph of a piece of a block, cut where ranks exchange tensors
engine      a graph compiled by TensorRT
runner      what runs a graph or an engine: tensors by name in, tensors by name out
chunk       17 frames <-> 3 latent frames, which the Video-VAE treats alone
"""
