"""Peers of the samplers of LLaDA and Fast-dLLM: the published loops' arithmetic, and small models to run them on."""

from types import SimpleNamespace

import torch
from torch.nn.functional import softmax

V, MASK, EOS, EOT = 37, 36, 5, 9
REACH = 40
"""Beyond this distance the toy's attention does not tell positions apart."""


class Toy:
    """Two layers of bidirectional attention over relative positions, float64 inside, float32 logits.

    ``past_key_values`` is a list of (k, v), [B, 1, L, d]; ``replace_position`` bool [B, L] says which of their
    positions the given tokens are (their own k and v overwrite the cached ones, in place), otherwise the tokens follow
    the cached ones. ``attention_mask`` [B, L] covers all keys.
    """

    device = torch.device("cpu")

    def __init__(self, seed=0, *, mask_logit=None, sharpness=6.0, width=12, size=V, dtype=torch.float32):
        draw = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(size, width, generator=draw, dtype=torch.float64)
        self.layers = [
            [torch.randn(width, width, generator=draw, dtype=torch.float64) / width**0.5 for _ in range(3)]
            for _ in range(2)
        ]
        self.head = torch.randn(width, size, generator=draw, dtype=torch.float64) / width**0.5 * sharpness
        self.near = torch.randn(2, 2 * REACH + 1, generator=draw, dtype=torch.float64) * 3
        self.mask_logit, self.dtype, self.bias = mask_logit, dtype, 0.0
        self.calls = []

    def attend(self, near, q, k, v, places, keep):
        distance = (places[:, :, None] - torch.arange(k.shape[1])).clamp(-REACH, REACH)
        score = q @ k.mT / q.shape[-1] ** 0.5 + near[distance + REACH]
        if keep is not None:
            score = score.masked_fill(keep[:, None] == 0, -torch.inf)
        return score.softmax(-1) @ v

    def hidden(self, ids, attention_mask=None, past_key_values=None, replace_position=None):
        batch, n = ids.shape
        places = torch.arange(n).expand(batch, n)
        if replace_position is not None:
            places = torch.stack([row.nonzero()[:, 0] for row in replace_position])
        elif past_key_values is not None:
            places = places + past_key_values[0][0].shape[2]
        h, present = self.embedding[ids], []
        for number, (wq, wk, wv) in enumerate(self.layers):
            k, v = h @ wk, h @ wv
            if past_key_values is not None:
                old_k, old_v = (t[:, 0] for t in past_key_values[number])
                if replace_position is not None:
                    old_k[replace_position], old_v[replace_position] = k.flatten(0, 1), v.flatten(0, 1)
                    k, v = old_k, old_v
                else:
                    k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
            present.append((k[:, None], v[:, None]))
            h = h + torch.tanh(self.attend(self.near[number], h @ wq, k, v, places, attention_mask))
        return h, present

    def __call__(
        self, ids, attention_mask=None, past_key_values=None, use_cache=False, replace_position=None
    ) -> SimpleNamespace:
        self.calls.append(tuple(ids.shape))
        h, present = self.hidden(ids, attention_mask, past_key_values, replace_position)
        logits = (h @ self.head + self.bias).to(self.dtype)
        if self.mask_logit is not None:
            logits[..., MASK] = self.mask_logit
        return SimpleNamespace(logits=logits, past_key_values=present if use_cache else None)


def gumbel(logits, temperature, generator=None):
    if temperature == 0:
        return logits
    u = torch.rand(logits.shape, dtype=torch.float64, generator=generator)
    return torch.exp(logits.double()) / (-torch.log(u)) ** temperature


def counts(masks, steps):
    """Row by row, the remainder to the first steps."""
    table = torch.zeros(len(masks), steps, dtype=torch.int64)
    for row, total in zip(table, masks.sum(1).tolist()):
        row += total // steps
        row[: total % steps] += 1
    return table


def start(prompt, gen_length):
    return torch.cat([prompt, torch.full((len(prompt), gen_length), MASK)], 1)


def best(confidence, n):
    """What topk finds; of equal confidences, whose order it leaves open, the first."""
    return confidence.sort(descending=True, stable=True).indices[: int(n)]


def llada(
    model, prompt, attention_mask=None, *, steps, gen_length, block_length, temperature=0.0, cfg_scale=0.0,
    remasking="low_confidence", logits_eos_inf=False, confidence_eos_eot_inf=False, generator=None,
    forbid=False, count_all=False, both_last=False, widen=False,
):  # fmt: skip
    """LLaDA's generate: the aliasing of its confidence option at temperature 0 included.

    Corrections: ``forbid`` the mask token, ``count_all`` masks, the prompt's too, ``both_last`` EOS and EOT at any
    temperature, ``widen`` logits to float32.
    """
    x = start(prompt, gen_length)
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(x), gen_length)], 1)
    given = x != MASK
    per_block = steps // (gen_length // block_length)
    for begin in range(prompt.shape[1], x.shape[1], block_length):
        end = begin + block_length
        plan = counts(x[:, 0 if count_all else begin : end] == MASK, per_block)
        for i in range(per_block):
            masked = x == MASK
            if cfg_scale > 0:
                both = torch.cat([x, torch.where(given, MASK, x)])
                mask = None if attention_mask is None else torch.cat([attention_mask] * 2)
                logits = model(both, attention_mask=mask).logits
                logits, uncond = (logits.float() if widen else logits).chunk(2)
                logits = uncond + (cfg_scale + 1) * (logits - uncond)
            else:
                logits = model(x, attention_mask=attention_mask).logits
            if logits_eos_inf:
                logits[..., EOS] = -torch.inf
            logits = logits.float() if widen else logits
            noisy = gumbel(logits, temperature, generator)
            allowed = noisy.clone()
            allowed[..., MASK] = -torch.inf if forbid else noisy[..., MASK]
            tokens = allowed.argmax(-1)
            if confidence_eos_eot_inf:
                noisy[..., EOS] = logits[..., EOT] = -torch.inf
                if both_last:
                    logits[..., EOS] = -torch.inf
            if remasking == "low_confidence":
                confidence = softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]
            else:
                confidence = torch.rand(tokens.shape, generator=generator)
            confidence = confidence.masked_fill(~masked, -torch.inf)
            confidence[:, end:] = -torch.inf
            for j in range(len(x)):
                chosen = best(confidence[j], plan[j, i])
                x[j, chosen] = torch.where(masked[j], tokens[j], x[j])[chosen]
    return x


def drawn(logits, temperature, generator, forbid):
    noisy = gumbel(logits, temperature, generator).clone()
    if forbid:
        noisy[..., MASK] = -torch.inf
    return noisy.argmax(-1)


def transfer(logits, temperature, remasking, masked, x, n=None, threshold=None, generator=None, forbid=False):
    """Fast-dLLM's get_transfer_index: confidences of a float64 softmax. ``forbid`` the mask: a correction."""
    tokens = drawn(logits, temperature, generator, forbid)
    if remasking == "low_confidence":
        confidence = softmax(logits.double(), -1).gather(-1, tokens[..., None])[..., 0]
    else:
        confidence = torch.rand(tokens.shape, dtype=torch.float64, generator=generator)
    confidence = confidence.masked_fill(~masked, -1.0)
    chosen = torch.zeros_like(masked)
    for j in range(len(x)):
        if threshold is not None:
            chosen[j] = confidence[j] >= threshold
            chosen[j, confidence[j].argmax()] = True
        else:
            chosen[j, best(confidence[j], n[j])] = True
    return torch.where(masked, tokens, x), chosen & masked


def transfer_dynamic(
    logits, temperature, remasking, masked, x, factor=1, generator=None, accept_last=True, forbid=False
):
    """Fast-dLLM's get_transfer_index_dynamic; ``accept_last`` is what it does when only the last one fails."""
    tokens = drawn(logits, temperature, generator, forbid)
    if remasking == "low_confidence":
        confidence = softmax(logits.double(), -1).gather(-1, tokens[..., None])[..., 0]
    else:
        confidence = torch.rand(tokens.shape, generator=generator).double()
    confidence = confidence.masked_fill(~masked, -1.0)
    chosen = torch.zeros_like(masked)
    for j in range(len(x)):
        ranked = confidence[j][masked[j]].sort(descending=True).values
        if not len(ranked):
            continue
        taken = 1
        while taken < len(ranked) and ranked[taken] >= 1 - factor / (taken + 2):
            taken += 1
        if accept_last and taken == len(ranked) - 1:
            taken += 1
        chosen[j, best(confidence[j], taken)] = True
    return torch.where(masked, tokens, x), chosen


def fast_dllm(
    model, prompt, *, cache=None, steps, gen_length, block_length, temperature=0.0, remasking="low_confidence",
    threshold=None, factor=None, generator=None, fixed=True, accept_last=True, second_draw=True, forbid=True,
):  # fmt: skip
    """Fast-dLLM's three loops. ``fixed``: with the dual cache no more steps than planned; ``second_draw``: with the
    prefix cache every step draws twice."""
    x = start(prompt, gen_length)
    per_block, calls = steps // (gen_length // block_length), 0
    for begin in range(prompt.shape[1], x.shape[1], block_length):
        end, i = begin + block_length, 0
        plan = counts(x[:, begin:end] == MASK, per_block)
        while i == 0 or (x[:, begin:end] == MASK).any():
            if cache == "dual" and fixed and i == per_block:
                break
            first, last = 0, x.shape[1]
            if cache is None:
                logits = model(x).logits
            elif i == 0:
                answer = model(x, use_cache=True)
                logits, past = answer.logits, answer.past_key_values
                if cache == "prefix":
                    past = [tuple(t[:, :, :begin] for t in layer) for layer in past]
            else:
                first, last = begin, end if cache == "dual" else last
                where = torch.zeros_like(x, dtype=torch.bool)
                where[:, begin:end] = True
                options = dict(replace_position=where) if cache == "dual" else {}
                logits = model(x[:, first:last], past_key_values=past, use_cache=True, **options).logits
                if cache == "prefix" and second_draw:
                    gumbel(logits, temperature, generator)
            calls += 1
            part = x[:, first:last]
            masked = part == MASK
            masked[:, end - first :] = False
            if factor is not None:
                tokens, chosen = transfer_dynamic(
                    logits, temperature, remasking, masked, part, factor, generator, accept_last, forbid
                )
            else:
                n = plan[:, i] if threshold is None else None
                tokens, chosen = transfer(logits, temperature, remasking, masked, part, n, threshold, generator, forbid)
            x[:, first:last] = torch.where(chosen, tokens, part)
            i += 1
    return x, calls
