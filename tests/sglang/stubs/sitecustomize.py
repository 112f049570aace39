"""Lets SGLang run its text path where there is no GPU.

Python imports this by itself in every process that has the folder on PYTHONPATH.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

ABSENT = {"IPython", "decord", "sgl_kernel", "soundfile", "torchvision"}
"""Packages for notebooks, pictures, sound and GPUs, which SGLang imports whatever it serves."""

CACHE = "sglang.srt.mem_cache.storage.lmcache.lmc_radix_cache"
CHOICE = 'LMCacheMode.IP if self.device.type == "xpu" else LMCacheMode.MP'


class Anything:
    """Whatever is asked of a package that is absent."""

    def __init__(self, *args, **options):
        pass

    def __call__(self, *args, **options):
        return args[0] if len(args) == 1 and callable(args[0]) else Anything()  # it may decorate

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __mro_entries__(self, bases):
        return (object,)


class AbsentModule(ModuleType):
    __path__ = []
    __version__ = "0.26.0"  # transformers compares it
    __getattr__ = Anything.__getattr__


class Absent(MetaPathFinder, Loader):
    """Imports the absent packages and all their modules."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return AbsentModule(spec.name)

    def exec_module(self, module):
        pass


class Changed(MetaPathFinder):
    """Imports one module as it is found on the path, with `execute` in place of its loader's."""

    def __init__(self, name, execute):
        self._name = name
        self._execute = execute

    def find_spec(self, name, path=None, target=None):
        if name != self._name:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec:
            loader, load = spec.loader, spec.loader.exec_module
            loader.exec_module = lambda module: self._execute(module, loader, load)
        return spec


def give_streams(torch, loader, load):
    """SGLang makes streams on every device, and torch for none but GPUs."""
    load(torch)
    if torch.cuda.is_available():
        return

    class Done:
        """A stream or an event: on a CPU, what was called is done."""

        def __init__(self, *args, **options):
            self.device = torch.device("cpu")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def query(self):
            return True

        def synchronize(self, *args):
            pass

        record = wait = wait_event = wait_stream = synchronize

    current = Done()
    for module in (torch.cuda, torch.cpu):
        module.Stream = module.Event = Done
        module.stream = lambda stream: stream
        module.current_stream = lambda device=None: current


def force_in_process(module, loader, load):
    """SGLang has the mode, and no option for it: users are told to edit the file."""
    text = loader.get_source(module.__name__)
    assert CHOICE in text
    code = compile(text.replace(CHOICE, "LMCacheMode.IP"), module.__file__, "exec")
    loader.get_code = lambda name: code
    load(module)


sys.meta_path[:0] = [Absent(), Changed("torch", give_streams)]
if os.environ.get("SGL_FORCE_IP"):
    sys.meta_path.insert(0, Changed(CACHE, force_in_process))
