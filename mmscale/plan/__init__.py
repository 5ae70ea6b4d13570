"""Computes parameters, FLOPs, memory, messages, time and layouts of a configuration. Measures nothing, needs no torch.

`plan` returns plain data with stable keys, `render` converts it to text.
"""

from mmscale.plan.communication import MessageKind, Operation, Traffic, communication, sent_by_kind
from mmscale.plan.compute import Flops, flops_per_token
from mmscale.plan.layouts import Layout
from mmscale.plan.memory import RankMemory, rank_memory
from mmscale.plan.parameters import Parameters, count_parameters
from mmscale.plan.render import render
from mmscale.plan.search import Search, search
from mmscale.plan.stages import stage_layers, stage_parameters
from mmscale.plan.summary import plan

__all__ = [
    "Flops",
    "Layout",
    "MessageKind",
    "Operation",
    "Parameters",
    "RankMemory",
    "Search",
    "Traffic",
    "communication",
    "count_parameters",
    "flops_per_token",
    "plan",
    "rank_memory",
    "render",
    "search",
    "sent_by_kind",
    "stage_layers",
    "stage_parameters",
]
