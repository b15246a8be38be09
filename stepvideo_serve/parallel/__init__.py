"""A group of rank processes that runs one job after another and survives the death of any of them.

group.py          what the parent uses: RankGroup
job.py            one job: Run, StepEvent, ResultEvent
generation.py     one generation of rank processes: spawn, watch, stop
watchdog.py       who is silent, who is stuck
rank_process.py   the program of a rank: what a factory returns (Worker) and what a job may do (JobContext)
channel.py        messages: length-prefixed JSON over a socket pair
shared_memory.py  tensors: anonymous shared memory, described in the messages
layout.py         how ranks share the network
communicator.py   what the network asks of the other ranks; collectives.py answers it, and joins the ranks
"""
