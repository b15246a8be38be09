"""A group of rank processes that runs one job after another and survives the death of any of them.

group.py    what the parent uses: RankGroup
run.py      one job: Run, StepEvent, ResultEvent
ranks.py    one generation of rank processes: spawn, watch, stop
vitals.py   who is silent, who is stuck
rendezvous.py  how the ranks find each other
worker.py   the program of a rank: what a factory returns (Worker) and what a job may do (JobContext)
channel.py  messages: length-prefixed JSON over a socket pair
arena.py    tensors: anonymous shared memory, described in the messages
"""
