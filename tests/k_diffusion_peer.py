"""The real ``k_diffusion.sampling``, also where what the rest of that package needs is not installed."""

import importlib
import importlib.util
import sys
import types

import pytest


def sampling():
    """The module as installed. Of ``k_diffusion`` itself, which imports wandb, kornia and more, only the name is made
    when it does not import; ``utils`` gets stand-ins for the torchvision functions that the samplers never call."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed", allow_module_level=True)
    try:
        return importlib.import_module("k_diffusion.sampling")
    except ImportError:
        for name in [n for n in sys.modules if n.split(".")[0] == "k_diffusion"]:
            del sys.modules[name]
    package = importlib.util.module_from_spec(spec)  # its path, not its contents
    sys.modules["k_diffusion"] = package
    if importlib.util.find_spec("torchvision") is None:
        functional = types.ModuleType("torchvision.transforms.functional")
        transforms = types.ModuleType("torchvision.transforms")
        transforms.functional = functional
        vision = types.ModuleType("torchvision")
        vision.transforms = transforms
        stand_ins = {m.__name__: m for m in (vision, transforms, functional)}
        sys.modules.update(stand_ins)
        try:
            return importlib.import_module("k_diffusion.sampling")
        finally:
            for name in stand_ins:  # other packages look for torchvision and must not find this
                del sys.modules[name]
    return importlib.import_module("k_diffusion.sampling")
