"""BlockRefinementScheduler: tokens of a block committed by confidence, and edited (LLaDA2, DiffusionGemma)."""

from __future__ import annotations

import functools

import diffusers
import torch
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput

from genfast.dropin.diffusers.base import check_seed, needs_generator, output_maker
from genfast.dropin.diffusers.discrete import Discrete, renoised, takes
from genfast.ops.token_sampling import sample_tokens
from genfast.ops.token_transfer import select_transfer

_output = output_maker(BlockRefinementSchedulerOutput)


class BlockRefinementScheduler(Discrete, diffusers.BlockRefinementScheduler):
    """``diffusers.BlockRefinementScheduler`` whose ``step`` reads the logits once.

    Greedy steps are fused always, drawing ones with ``seed=``. Probabilities are those of the peer to a rounding of
    float32; of positions that are equally probable, the first is committed, where the peer's order is not defined.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: torch.BoolTensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        seed: int | torch.Tensor | None = None,
    ) -> BlockRefinementSchedulerOutput | tuple:
        """The peer's step; ``seed`` draws tokens inside the kernel, in place of ``generator``."""
        given, seed = seed, check_seed(self, generator, seed)
        draws = temperature != 0 and sampling_method in ("auto", "multinomial")
        fused = takes(model_output, sample) and temperature >= 0
        if draws:
            top_k = None if top_k is None or not 0 < top_k < model_output.shape[-1] else top_k
            top_p = None if top_p is None or top_p >= 1 else top_p
            # The peer's nucleus is that of the k largest; the kernel's k largest are those of the nucleus.
            fused &= seed is not None and (top_k is None or top_p is None) and (top_p is None or top_p > 0)
        if not fused:
            needs_generator(seed)
            return super().step(
                model_output,
                timestep,
                sample,
                mask_token_id=mask_token_id,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                sampling_method=sampling_method,
                threshold=threshold,
                editing_threshold=editing_threshold,
                minimal_topk=minimal_topk,
                prompt_mask=prompt_mask,
                generator=generator,
                return_dict=return_dict,
            )
        threshold = float(self.config.threshold if threshold is None else threshold)
        if editing_threshold is None:
            editing_threshold = self.config.editing_threshold
        step = self.whole_timestep(timestep)
        stream = self.stream(step, given)
        if draws:
            drawn = dict(temperature=temperature, top_k=top_k, top_p=top_p, confidence="tempered", seed=seed)
            found = sample_tokens(model_output, stream=stream, **drawn)
        else:
            found = sample_tokens(model_output)
        tokens, confidence = found.tokens, found.confidence
        if mask_token_id is None:
            draw = functools.partial(renoised, generator=generator, seed=seed, stream=stream)
            result = self._uniform_step(found, step, sample, threshold, editing_threshold, draw, model_output)
            return _output(*result) if return_dict else result

        masked = sample == mask_token_id
        if self._transfer_schedule is None:
            transfer = torch.zeros_like(masked)
        else:
            schedule = self.host_values("_transfer_schedule")
            n = schedule[min(step, len(schedule) - 1)]
            transfer = select_transfer(confidence, masked, n, strategy="threshold", threshold=threshold, strict=True)
        if editing_threshold is not None and editing_threshold > 0:
            edited = ~masked & (confidence > float(editing_threshold)) & (tokens != sample)
            if prompt_mask is not None:
                edited &= ~prompt_mask
        else:
            edited = torch.zeros_like(masked)
        x = torch.where(transfer | edited, tokens, sample)
        result = x, transfer, edited, tokens, confidence, model_output
        return _output(*result) if return_dict else result

    def _uniform_step(self, found, step, sample, threshold, editing_threshold, draw, model_output):
        """Without a mask token: what is not committed yet becomes uniform noise again."""
        committed = self._committed
        if step == 0 or committed is None or committed.shape != sample.shape:
            committed = torch.zeros_like(sample, dtype=torch.bool)
        tokens, confidence = found.tokens, found.confidence
        target = -(-(step + 1) * sample.shape[1] // self.num_inference_steps)
        needed = (target - committed.sum(dim=-1)).clamp_(min=0)
        transfer = select_transfer(
            confidence, ~committed, needed, strategy="threshold", threshold=threshold, strict=True
        )
        if editing_threshold is not None:
            edited = committed & (confidence > float(editing_threshold)) & (tokens != sample)
        else:
            edited = torch.zeros_like(transfer)
        x = torch.where(transfer | edited, tokens, sample)
        committed = committed | transfer
        x = draw(x, committed, model_output.shape[-1])
        self._committed = committed
        return x, transfer, edited, tokens, confidence, model_output
