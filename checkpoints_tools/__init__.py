"""Tools for checkpoints that exist: show, verify, reshard, archive, average, upcycle, to and from Hugging Face.

Writing checkpoints while training is the business of `mmscale.checkpoint`.
"""
