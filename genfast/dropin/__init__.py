"""Drop-ins: one module (or package) per peer project, with the peer's own names and signatures.

======================== ============================ =====================================================
module                   peer                         one line
======================== ============================ =====================================================
``dropin.diffusers``     diffusers                    ``genfast.patch("diffusers")``, ``genfast.accelerate(pipe)``
``dropin.k_diffusion``   k-diffusion                  ``genfast.patch("k_diffusion")``
``dropin.edm``           EDM (Karras et al. 2022)     ``from genfast.dropin.edm import edm_sampler``
``dropin.score_sde``     score_sde_pytorch            ``from genfast.dropin.score_sde import get_pc_sampler``
``dropin.flow_matching`` flow_matching, torchcfm      ``from genfast.dropin.flow_matching import ODESolver``
``dropin.llada``         LLaDA (Nie et al. 2025)      ``from genfast.dropin.llada import generate``
``dropin.fast_dllm``     Fast-dLLM (Wu et al. 2025)   ``from genfast.dropin.fast_dllm import generate_with_dual_cache``
``dropin.dream``         Dream (Ye et al. 2025)       ``from genfast.dropin.dream import diffusion_generate``
``dropin.sdar``          SDAR (Cheng et al. 2025)     ``from genfast.dropin.sdar import block_diffusion_generate``
``dropin.llada2``        LLaDA2.0 and 2.1             ``from genfast.dropin.llada2 import generate``
``dropin.sedd``          SEDD (Lou et al. 2023)       ``from genfast.dropin.sedd import get_pc_sampler``
``dropin.mdlm``          MDLM (Sahoo et al. 2024)     ``Diffusion._sample = genfast.dropin.mdlm._sample``
``dropin.bd3lm``         BD3-LM (Arriola et al. 2025) ``from genfast.dropin.bd3lm import _semi_ar_sampler``
``dropin.attention``     PyTorch's two functions      ``from genfast.dropin import flex_attention``
``dropin.ddp_hooks``     DDP's communication hooks    ``ddp.register_comm_hook(None, ddp_hooks.bf16_compress_hook)``
``dropin.transformers``  Hugging Face transformers    ``genfast.patch("transformers")``, a model on :func:`attention`
``dropin.encodec``       EnCodec, DAC (transformers)  ``genfast.dropin.encodec.replace(model)``
``dropin.taming``        taming-transformers (VQGAN)  ``from genfast.dropin.taming import VectorQuantizer2``
``dropin.var``           VAR (Tian et al. 2024)       ``from genfast.dropin.var import VectorQuantizer2``
======================== ============================ =====================================================

And ``dropin.vector_quantize_pytorch`` for vector-quantize-pytorch: ``genfast.patch("vector_quantize_pytorch")``.

A peer is imported only when its drop-in is.
"""

import importlib

from genfast.dropin import patching  # noqa: F401


def __getattr__(name: str):
    if name in ("flex_attention", "scaled_dot_product_attention"):
        return getattr(importlib.import_module("genfast.dropin.attention"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
