"""A package named `tensorrt_llm` that has what connectors import, of one version at a time."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType

import standin_api
import standin_args
import standin_comm
import standin_layout
import standin_llm
import standin_request
from standin_manager import KvCacheConnectorManager
from standin_profiles import PROFILES

__all__ = ["PROFILES", "installed"]

PACKAGE = "tensorrt_llm"
DERIVED = ("minimal", "broken", "lmcache.integration.tensorrt_llm", "lmcache.adapters.trtllm")
COLLECTIVES = ("mpi_rank", "mpi_world_size", "mpi_broadcast", "mpi_allgather")


def modules(profile):
    """Every module of the package, under its name."""
    connector = standin_api.connector_module(profile)
    connector.KvCacheConnectorManager = KvCacheConnectorManager
    args, registry = standin_args.args_module(profile)
    made = {connector.__name__: connector, args.__name__: args}

    def add(name, **members):
        module = made.setdefault(name, ModuleType(name))
        vars(module).update(members)

    collectives = {name: getattr(standin_comm, name) for name in COLLECTIVES}
    add(PACKAGE, mpi_rank=standin_comm.mpi_rank)
    add(PACKAGE, LLM=standin_llm.llm_class(profile), SamplingParams=standin_llm.SamplingParams)
    add(f"{PACKAGE}._utils", **collectives)
    add(f"{PACKAGE}.bindings", LlmRequestState=standin_request.LlmRequestState)
    native, python = standin_request.NativeRequest, standin_request.PythonRequest
    add(f"{PACKAGE}.bindings.internal.batch_manager", LlmRequest=native)
    add(f"{PACKAGE}._torch.pyexecutor.llm_request", LlmRequest=python)
    if registry:
        folder = connector.__name__.rpartition(".")[0]
        add(f"{folder}.registry", CONNECTOR_REGISTRY=registry)
    if profile.main:
        folder = connector.__name__.rpartition(".")[0]
        add(f"{folder}.kv_cache_layout", **vars_of(standin_layout))
    return with_parents(made)


def vars_of(module):
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def with_parents(made):
    """The modules and the packages they are in, tied to each other."""
    for name in list(made):
        while name := name.rpartition(".")[0]:
            made.setdefault(name, ModuleType(name)).__path__ = []
    for name, module in made.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(made[parent], own, module)
    return made


def of(*packages):
    """The imported modules of some packages."""
    return [name for name in sys.modules if name in packages or name.startswith(_inside(packages))]


def _inside(packages):
    return tuple(f"{package}." for package in packages)


@contextmanager
def installed(name, afresh=DERIVED):
    """One version is there; what is named `afresh` is imported anew, as it derives from it."""
    profile = PROFILES[name]
    kept = {each: sys.modules.pop(each) for each in of(PACKAGE, *afresh)}
    sys.modules.update(modules(profile))
    try:
        yield profile
    finally:
        for each in of(PACKAGE, *afresh):
            del sys.modules[each]
        sys.modules.update(kept)
