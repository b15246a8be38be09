"""Evaluation sets from running servers, and what their clips measure: the extra `evaluation`.

A folder of clips (results.py says what is in it) is made by `stepvideo batch`, looked at by `stepvideo metrics`, and
two are set against each other by `stepvideo compare`. Nothing here needs torch, or the weights of another model.
"""
