"""One generation of text: the state that every text sampler keeps, and the step that most of them take."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from genfast._registry import export
from genfast.ops._checks import checked_seed, fresh_seed
from genfast.ops.token_transfer import commit_, select_transfer
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.output import HeadOutput, Output, call


@export("samplers")
class TextSample(NamedTuple):
    """What a text sampler returns: the tokens, and how they came about."""

    tokens: Tensor
    """int64 [B, L]: padding, prompt and generated text of every row; the text begins at column ``start``."""
    start: int
    """The first generated column."""
    pad: Tensor
    """int64 [B]: how many columns of padding a row begins with."""
    order: Tensor
    """int32 [B, L]: the step, from 1, at which a position got the token it has; 0 for prompt and padding."""
    steps: int
    """How many steps were made."""
    evaluations: int
    """How many times the model was called."""


class TextState(NamedTuple):
    """What a callback sees after a step; the tensors are the sampler's own, to be read only."""

    step: int
    x: Tensor
    order: Tensor
    block: tuple[int, int]
    """The columns that the step worked on, [first, last)."""


class Run:
    """The state of one generation.

    Attributes:
        x: int64 [B, L], written in place.
        layout: where the prompt ends and what is padding.
        order: see :class:`TextSample`.
        step: steps made so far.
        stream: of the next step's draws, one more after every step. A sampler whose number of steps depends on the
            whole batch sets it, so that a row's draws do not depend on its neighbours.
    """

    def __init__(
        self,
        model: Callable,
        layout: Layout,
        *,
        mask_id: int,
        eos_id: int | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        offset: int = 0,
        head: Tensor | tuple[Tensor, Tensor | None] | None = None,
        callback: Callable[[TextState], None] | None = None,
        advance: Callable[[], None] = lambda: None,
    ):
        """
        Args:
            seed: an int, or int64 [B] with one per row: a row's draws then depend on nothing but its own seed. By
                default one is taken from torch's default generator.
            generator: draw as the published code does, with noise of the size of the logits, instead.
            offset: row b of the batch draws as row offset + b: a batch drawn in parts is the batch drawn whole.
            head: weight [V, d], or (weight, bias): the model then returns hidden states, see :class:`HeadOutput`.
            advance: called after every step (a progress bar).
        """
        if seed is not None and generator is not None:
            raise ValueError("seed and generator exclude each other: give one source of randomness")
        if head is not None and generator is not None:
            raise ValueError("generator draws for logits, and with a head there are none: give a seed")
        self.model, self.layout, self.x = model, layout, layout.x
        self.mask_id, self.eos_id, self.generator, self.offset = mask_id, eos_id, generator, offset
        self.seed = None
        if generator is None:
            self.seed = fresh_seed() if seed is None else checked_seed(seed, len(self.x), self.x.device)
        self.order = torch.zeros(self.x.shape, dtype=torch.int32, device=self.x.device)
        self.step = self.stream = self.evaluations = 0
        self.callback, self.advance, self.head = callback, advance, head
        self._ids: tuple[tuple[int, int], Tensor] | None = None

    @property
    def randomness(self) -> dict:
        """The options of an op that draw this step's numbers."""
        if self.generator is not None:
            return dict(generator=self.generator)
        return dict(seed=self.seed, stream=self.stream, offset=self.offset)

    def evaluate(self, ids: Tensor | None = None, *, first: int = 0, **options) -> tuple[Output, object]:
        """The model's (output, whole answer) for ``ids``, by default all of x; ``first`` is the column of ids[:, 0]."""
        ids = self.x if ids is None else ids
        if "attention_mask" not in options:
            options["attention_mask"] = self.layout.attention_mask
        values, answer = call(self.model, ids, **options)
        self.evaluations += 1
        output = Output(values, first=first) if self.head is None else HeadOutput(values, self.head, first=first)
        return output, answer

    def masked(self, first: int, last: int) -> Tensor:
        """bool [B, last - first]: where columns [first, last) hold the mask."""
        return self.x[:, first:last] == self.mask_id

    def sample(self, output: Output, first: int, last: int, where: Tensor | None = None, **options):
        """A :class:`genfast.TokenSample` [B, last - first] with this step's numbers; see :meth:`Output.sample`."""
        return output.sample(first, last, where, self.ids(first, last), **options, **self.randomness)

    def ids(self, first: int, last: int) -> Tensor:
        """Identities [B, last - first] of positions: :meth:`Layout.row_ids`."""
        if self._ids is None or self._ids[0] != (first, last):  # the steps of a block share them
            per_row = isinstance(self.seed, Tensor) and self.seed.dim() == 1
            columns = torch.arange(first, last, device=self.x.device)
            self._ids = (first, last), self.layout.row_ids(columns, self.offset, per_row)
        return self._ids[1]

    def select(self, confidence: Tensor, candidates: Tensor, n=1, **options) -> Tensor:
        """:func:`genfast.select_transfer` with this step's numbers.

        With a generator its noise comes from a seed that is drawn from it, and only where noise is needed.
        """
        noisy = options.get("strategy") == "random" or options.get("temperature", 0.0) > 0
        if not noisy:
            return select_transfer(confidence, candidates, n, **options)
        randomness = self.randomness
        if self.generator is not None:
            device = self.generator.device
            drawn = torch.randint(-(2**63), 2**63 - 1, (), generator=self.generator, device=device)
            randomness = dict(seed=drawn.to(self.x.device))
        return select_transfer(confidence, candidates, n, **options, **randomness)

    def commit(self, first: int, last: int, tokens: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Write tokens to columns [first, last) where selected; see :func:`genfast.commit_`. Ends the step."""
        block = self.x[:, first:last]
        left, finished = commit_(block, tokens, selected, mask_id=self.mask_id, eos_id=self.eos_id)
        written = selected & (block != self.mask_id)
        self.step += 1
        self.stream += 1
        self.order[:, first:last].masked_fill_(written, self.step)
        self.end_step(first, last)
        return left, finished

    def end_step(self, first: int, last: int) -> None:
        """Tell the callback and the progress bar; :meth:`commit` does, loops that write x themselves call it."""
        self.advance()
        if self.callback is not None:
            self.callback(TextState(self.step, self.x, self.order, (first, last)))

    def unmask(self, output: Output, first: int, last: int, n, *, sample: dict, select: dict):
        """One step on columns [first, last): tokens and confidences of the masked positions, choice, write.

        A strategy that does not look at confidences (``random``, ``sequential``) chooses first, and only the chosen
        positions are read.

        Args:
            n: how many positions of a row, int or int64 [B].
            sample, select: options of :func:`genfast.sample_tokens` and :func:`genfast.select_transfer`.

        Returns:
            (left, finished) of :func:`genfast.commit_`, of these columns.
        """
        candidates = self.masked(first, last)
        if select.get("strategy") in ("random", "sequential"):
            selected = self.select(candidates.float(), candidates, n, **select)
            found = self.sample(output, first, last, selected, **{**sample, "confidence": None})
        else:
            found = self.sample(output, first, last, candidates, **sample)
            selected = self.select(found.confidence, candidates, n, **select)
        return self.commit(first, last, found.tokens, selected)

    def ended(self, last: int) -> Tensor:
        """bool [B]: rows whose generated columns before ``last`` hold an end of sequence and no mask before it."""
        text = self.x[:, self.layout.start : last]
        if self.eos_id is None or not text.shape[1]:
            return torch.zeros(len(text), dtype=torch.bool, device=text.device)
        places = torch.arange(text.shape[1], device=text.device)
        first_eos = torch.where(text == self.eos_id, places, text.shape[1]).amin(1)
        first_mask = torch.where(text == self.mask_id, places, text.shape[1]).amin(1)
        return first_eos < first_mask

    def end_rows(self, last: int) -> Tensor:
        """bool [B]: rows that have ended before column ``last`` (:meth:`ended`). Everything after a row's first end of
        sequence becomes one too, at the step that has just been made: it cannot matter any more."""
        ended = self.ended(last)
        if self.eos_id is None:
            return ended
        text, order = self.x[:, self.layout.start :], self.order[:, self.layout.start :]
        after = ((text == self.eos_id).cumsum(1) > 0) & ended[:, None] & (text != self.eos_id)
        order.masked_fill_(after, self.step)
        text.masked_fill_(after, self.eos_id)
        return ended

    def result(self) -> TextSample:
        return TextSample(self.x, self.layout.start, self.layout.pad, self.order, self.step, self.evaluations)


def even_counts(masks: Tensor | int, steps: int) -> Tensor:
    """How many positions to unmask at each step, int64 [steps] or [B, steps]: even, the remainder to the first ones
    (LLaDA's ``get_num_transfer_tokens``)."""
    masks = torch.as_tensor(masks)
    k = torch.arange(steps, device=masks.device)
    return torch.div(masks[..., None], steps, rounding_mode="floor") + (k < (masks[..., None] % steps))
