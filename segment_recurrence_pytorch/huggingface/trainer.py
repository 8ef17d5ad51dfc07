"""`ForTrainer`: trains a `SegmentWrapper` with `transformers.Trainer` (extra `hf`).

    trainer = Trainer(ForTrainer(wrapper), TrainingArguments('runs/mine'), train_dataset=texts)
    trainer.train()
    trainer.save_model('runs/mine/final')
    load_weights(ForTrainer(wrapper), 'runs/mine/final/model.safetensors')     # later

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from segment_recurrence_pytorch.checks import needs_extra
from segment_recurrence_pytorch.loss import IGNORE, mean_loss
from segment_recurrence_pytorch.wrapper import SegmentWrapper

try:
    from transformers.modeling_outputs import CausalLMOutput
except ImportError as error:
    raise needs_extra('ForTrainer', 'hf', error) from error


class ForTrainer(nn.Module):
    """A module with the calls that `transformers.Trainer` makes, around a wrapper of any causal model.

    Trainer runs `loss.backward()` on one graph. For long sequences, give the wrapper recompute=True, which holds the
    activations of one window at a time. Rows are padded at their end.

    Args:
        wrapper: the wrapper. It has no process_group, since Trainer counts the targets of all ranks itself.

    Raises:
        ValueError: if it is no wrapper, if it has a process_group, or if its model is not causal.
    """

    loss_type = 'ForCausalLM'  # tells Trainer to count labels[:, 1:], since the first one is no target
    accepts_loss_kwargs = True  # tells Trainer to give that count, of all batches of a step, as num_items_in_batch

    def __init__(self, wrapper: SegmentWrapper):
        super().__init__()
        if not isinstance(wrapper, SegmentWrapper):
            raise ValueError(f'ForTrainer takes a SegmentWrapper, not a {type(wrapper).__name__}: wrap the model first')
        if wrapper.process_group is not None:
            raise ValueError(
                'the wrapper has a process_group, but Trainer counts the targets of all ranks: leave it out'
            )
        if not wrapper.model.causal:
            raise ValueError('Trainer shifts the labels of a causal model: this model has causal=False')
        self.wrapper = wrapper
        # hooks, since a module around this one calls neither `state_dict` nor `load_state_dict` of this one
        self.register_state_dict_post_hook(_drop_second_names)
        self.register_load_state_dict_pre_hook(_add_second_names)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """Computes the loss, or the logits if there are no labels.

        Args:
            input_ids: token ids (b, n).
            attention_mask: (b, n), 0 where a row is padded. Default: None, all positions are valid.
            labels: as transformers has them: labels[:, i] is the token at position i itself, or -100 where it does not
                count. They are shifted here. Default: None.
            num_items_in_batch: number of targets by which to divide the sum of the losses. Default: None, those of this
                batch.

        Returns:
            A `CausalLMOutput`, with the loss in nats () if labels are given, else with the logits (b, n, num_tokens).

        Raises:
            ValueError: if a label that counts follows a padded position, which cannot predict it.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        if labels is None:
            return CausalLMOutput(logits=self.wrapper.logits(input_ids, mask=mask)[0])
        targets = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)), dim=1)
        if mask is not None and (unread := (targets != IGNORE) & ~mask).any():
            row, position = unread.nonzero()[0].tolist()
            raise ValueError(
                f'row {row} has a label at position {position + 1} and padding before it, which cannot predict it: pad '
                'rows at their end, with labels of -100 there'
            )
        if num_items_in_batch is None:
            return CausalLMOutput(loss=self.wrapper.loss(input_ids, labels=targets, mask=mask).loss)
        total = self.wrapper.loss(input_ids, labels=targets, mask=mask, reduction='sum').loss
        return CausalLMOutput(loss=mean_loss(total, torch.as_tensor(num_items_in_batch, device=total.device)))

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Raises ValueError. Trainer calls it if its arguments ask for gradient checkpointing."""
        raise ValueError(
            'gradient_checkpointing is that of transformers: leave it out, and give SegmentWrapper(recompute=True), '
            'which holds the activations of one window of segments at a time'
        )

    activation_checkpointing_enable = gradient_checkpointing_enable  # its name in newer versions

    def _second_names(self) -> dict[str, str]:
        """Returns the names of tied weights but the first one, each with the first name."""
        names: dict[int, str] = {}
        second = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if names.setdefault(id(parameter), name) != name:
                second[name] = names[id(parameter)]
        return second


def _drop_second_names(module: ForTrainer, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Takes the second names of tied weights out of a `state_dict()`: Trainer saves with safetensors, which refuses
    them."""
    for name in module._second_names():
        state_dict.pop(prefix + name, None)


def _add_second_names(module: ForTrainer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Adds what `_drop_second_names` took out, before the weights are loaded."""
    for name, kept in module._second_names().items():
        if prefix + kept in state_dict:
            state_dict.setdefault(prefix + name, state_dict[prefix + kept])
