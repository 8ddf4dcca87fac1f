"""The proof, before the first step, that attention sees what it should, and nothing else.

It keeps documents apart; that of a causal model never looks ahead, that of an encoder does.
"""

from types import SimpleNamespace
from typing import Any

import torch

from finetune.errors import ModelError
from finetune.models import families
from finetune.models.attention_choice import is_padded, own_attention


def check(
    model: torch.nn.Module, base: Any, kernel: str, device: torch.device, precision: str
) -> None:
    """Raise ModelError if tokens see what they must not, as a dozen random tokens show.

    Other tokens in a document must not move the next document's logits, nor, in causal models and
    decoders, a later token those of earlier ones, and `kernel` must give what the model's own
    attention gives. An encoder must see all of a document, and no padding. `base` is the model
    inside its wrappers. Models that mix positions outside attention (convolutions, recurrent
    states) fail here.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        probe = _Probe(model, base, device)
        exact = precision == "fp32" and next(model.parameters()).dtype == torch.float32
        tolerance = 1e-4 if exact else 5e-2
        if probe.family.causal:
            probe.require_causal(probe.whole)
        else:
            probe.require_both_ways()
        if not is_padded(kernel):
            probe.require_separate()
            probe.require_like_own(kernel, tolerance)
        elif not probe.family.causal:
            probe.require_no_padding_seen(tolerance)
    model.train(was_training)


class _Probe:
    """A dozen random tokens, and what a model makes of them when some are changed."""

    def __init__(self, model: torch.nn.Module, base: Any, device: torch.device) -> None:
        self.model, self.base, self.device = model, base, device
        self.family = families.of_model(base)
        self.vocab_size = base.config.get_text_config().vocab_size
        random = torch.Generator().manual_seed(0)
        self.ids = torch.randint(self.vocab_size, (1, 12), generator=random)
        self.has_experts = has_experts(base)
        # What is not seen changes nothing, to the bit; but in a mixture of experts it changes the
        # shapes, and with them the rounding, of the matrix products that the rest takes part in.
        self.rounding = 1e-2 if self.has_experts else 1e-5
        self.whole = self.logits([12])
        self.scale = float(self.whole.abs().max())

    def logits(self, lengths: list[int], changed: slice = slice(0)) -> torch.Tensor:
        """Return logits [12, V] in documents of these lengths, with other tokens at `changed`."""
        return self.answer(inputs_of(self.changed(changed), lengths, self.base))

    def changed(self, part: slice) -> torch.Tensor:
        """Return the tokens with other ones in a part."""
        ids = self.ids.clone()
        ids[:, part] = (ids[:, part] + 1) % self.vocab_size
        return ids

    def answer(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return logits, a row of them for each token, or one for the document."""
        there = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        if self.family == families.SCORES:
            return self.scores(there)
        logits: torch.Tensor = self.model(**there).logits.float().flatten(0, -2)
        return logits

    def scores(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the score of each token, [12, 1]; the model's own forward keeps that of one."""
        found: list[torch.Tensor] = []
        layer = families.score_head(self.base)
        hook = layer.register_forward_hook(lambda _, __, scores: found.append(scores))
        try:
            self.model(**inputs)
        finally:
            hook.remove()
        return found[0].float().flatten(0, -2)

    def differ(self, one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
        return logits_differ(one, other, tolerance * self.scale, self.has_experts)

    def require_causal(self, whole: torch.Tensor) -> None:
        """`whole`: logits [12, V] of the unchanged tokens by the attention of now."""
        # In a mixture of experts a single token may move by rounding; the one before a change must
        # not move each time.
        cuts = (11, 9, 7, 5) if self.has_experts else (11,)
        seen = [self.logits([12], slice(cut, 12))[:cut] for cut in cuts]
        last = torch.stack([each[-1] for each in seen])
        same = torch.stack([whole[cut - 1] for cut in cuts])
        looks_ahead = self.differ(seen[0], whole[:11], self.rounding)
        if looks_ahead or self.differ(last, same, self.rounding):
            config = self.base.config
            raise ModelError(
                f"{config.model_type} lets a token see those after it "
                f"({config._attn_implementation} attention), so it would learn to copy them; it is "
                "not a causal language model"
            )

    def require_both_ways(self) -> None:
        """Raise ModelError unless the first token, or the row's answer, depends on all others."""
        seen, kind = self.logits([12], slice(1, 12)), self.base.config.model_type
        if not bool((seen[0] != self.whole[0]).any()):
            attention = f"{self.base.config._attn_implementation} attention"
            if not bool((self.logits([12], slice(0, 11))[-1] != self.whole[-1]).any()):
                raise ModelError(
                    f"{kind} lets no token see another ({attention}): its attention adds zeros, as "
                    "random weights may start so or a kernel is missing on this machine; take "
                    "trained weights or another model"
                )
            raise ModelError(
                f"{kind} does not let a token see those after it ({attention}), as an encoder must"
            )
        if self.family == families.SEQ2SEQ:
            ids = self.changed(slice(11, 12))
            ahead = self.answer(inputs_of(self.ids, [12], self.base) | {"decoder_input_ids": ids})
            if self.differ(ahead[:11], self.whole[:11], self.rounding):
                raise ModelError(
                    f"the decoder of {kind} lets a token see those after it, so it would learn to "
                    "copy them"
                )

    def require_no_padding_seen(self, tolerance: float) -> None:
        """Raise ModelError if what only fills up a row of the encoder's moves other logits."""
        mask = (torch.arange(12) < 9).long()[None]
        padded = inputs_of(self.ids, [12], self.base) | {"attention_mask": mask}
        alone = inputs_of(self.ids[:, :9], [9], self.base)
        if self.family == families.SEQ2SEQ:
            alone["decoder_input_ids"] = self.ids
        wanted = self.answer(alone)
        if self.differ(self.answer(padded)[: len(wanted)], wanted, tolerance):
            raise ModelError(
                f"{self.base.config.model_type} lets tokens see padding, so a row's answer would "
                "depend on the rows beside it"
            )

    def require_separate(self) -> None:
        second = self.logits([5, 7])[5:]
        if self.differ(second, self.logits([5, 7], slice(0, 5))[5:], self.rounding):
            raise ModelError(
                f"{self.base.config.model_type} lets a document see the one before it in the same "
                "sequence; set data.packing: false and model.attention: sdpa"
            )

    def require_like_own(self, kernel: str, tolerance: float) -> None:
        with own_attention(self.base):
            own = self.logits([12])
            if self.family.causal:
                self.require_causal(own)
        if self.differ(own, self.whole, tolerance):
            raise ModelError(
                f"{self.base.config.model_type} has an attention of its own that {kernel} does not "
                "follow; set data.packing: false and model.attention: eager"
            )


def has_experts(model: Any) -> bool:
    return any("experts" in name for name, _ in model.named_modules())


def logits_differ(
    one_TV: torch.Tensor, other_TV: torch.Tensor, tolerance: float, has_experts: bool
) -> bool:
    """Whether two answers to the same tokens differ by more than rounding does; NaN differs.

    In a mixture of experts rounding may send a token, whose two best experts are nearly equal, to
    the other one, which moves its logits by tens of percent: there a quarter of the tokens may
    differ. What the probes look for moves more of them: a leak, another scale and a cap all but the
    first of a document, a convolution over four tokens three of the probe's seven.
    """
    differ_T = ~((one_TV - other_TV).abs().amax(-1) <= tolerance)
    return bool(differ_T.float().mean() > (0.25 if has_experts else 0.0))


def inputs_of(tokens: torch.Tensor, lengths: list[int], base: Any) -> dict[str, Any]:
    """Name the inputs of a model for tokens int64 [1, T] in documents of these lengths.

    They lie end to end; with padded attention they are one document.
    """
    device = tokens.device
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(lengths)
    of_documents = {
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
        "max_length_q": longest, "max_length_k": longest,
        "document_lengths": SimpleNamespace(values=lengths),
    }  # fmt: skip
    separate = (
        {"attention_mask": torch.ones_like(tokens)}
        if is_padded(base.config._attn_implementation)
        else of_documents
    )
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    inputs = families.inputs_of(tokens, base)
    if not families.is_encoder_decoder(base.config):
        inputs["position_ids"] = positions
    return inputs | separate
